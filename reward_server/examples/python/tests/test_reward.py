from __future__ import annotations

import pytest

from reward import reward_of


@pytest.mark.parametrize(
    ("completion", "reference", "match", "form"),
    [
        ("42", "42", 1.0, 0.0),
        (" 42 .\n", "\t42\r\n", 1.0, 0.25),
        ("42..", "42.", 1.0, 0.25),
        ("42..", "42", 0.0, 0.25),
        (".", "", 1.0, 0.25),
        ("", "", 1.0, 0.0),
        ("42.\u00a0", "42", 0.0, 0.0),
        ("caf\u00e9", "cafe\u0301", 0.0, 0.0),
    ],
)
def test_the_answer_is_the_trimmed_text_without_one_ending_mark(
    completion: str, reference: str, match: float, form: float
) -> None:
    reward = reward_of(completion, reference)
    assert (reward.match, reward.format, reward.length) == (match, form, 0.0)
    assert reward.value == match + form


@pytest.mark.parametrize(("count", "length"), [(64, 0.0), (65, -1 / 256), (192, -0.5), (320, -1.0), (1000, -1.0)])
@pytest.mark.parametrize("character", ["a", "\u00e9", "\U0001f600", " "])
def test_every_code_point_above_64_costs_until_the_limit(character: str, count: int, length: float) -> None:
    reward = reward_of(character * count, "42")
    assert reward.length == length
    assert reward.value == length
