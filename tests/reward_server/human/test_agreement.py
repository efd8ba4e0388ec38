from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

import pytest

from reward_server.human.agreement import krippendorff_alpha


def coincidences(*units: Sequence[float]) -> Counter[tuple[float, float]]:
    """Of the ratings of several samples."""
    pairs: Counter[tuple[float, float]] = Counter()
    for unit in units:
        for pair in itertools.permutations(unit, 2):
            pairs[pair] += 1 / (len(unit) - 1)  # type: ignore[assignment]
    return pairs


def test_it_is_what_krippendorff_publishes() -> None:
    # Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011), the reliability data of section C with four
    # observers and twelve units, of which one has a single value; its interval alpha is 0.849.
    observers = [
        "1 2 3 3 2 1 4 1 2 . . .",
        "1 2 3 3 2 2 4 1 2 5 . 3",
        ". 3 3 3 2 3 4 2 2 5 1 .",
        "1 2 3 3 2 4 4 1 2 5 1 .",
    ]
    columns = zip(*(row.split() for row in observers), strict=True)
    units = [[float(value) for value in column if value != "."] for column in columns]
    assert krippendorff_alpha(coincidences(*units)) == pytest.approx(0.849, abs=5e-4)


def test_it_is_what_a_hand_works_out() -> None:
    # Pairs within units: (1, 2), (4, 4). D_o = (2 * 1 / 1 + 0) / 4 = 1/2.
    # All ordered pairs of 1 2 4 4: 2 * (1 + 9 + 9 + 4 + 4 + 0) = 54. D_e = 54 / (4 * 3) = 9/2.
    assert krippendorff_alpha(coincidences([1, 2], [4, 4])) == pytest.approx(1 - (1 / 2) / (9 / 2))


def test_full_agreement_is_one_and_systematic_disagreement_is_below_zero() -> None:
    assert krippendorff_alpha(coincidences([1, 1], [2, 2])) == 1.0
    below = krippendorff_alpha(coincidences([1, 2], [2, 1]))
    assert below is not None
    assert below < 0


@pytest.mark.parametrize("units", [[], [[3, 3], [3, 3]], [[0.1, 0.1, 0.1], [0.1, 0.1, 0.1]]])
def test_where_it_is_undefined_there_is_none(units: list[list[float]]) -> None:
    assert krippendorff_alpha(coincidences(*units)) is None
