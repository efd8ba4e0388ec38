from __future__ import annotations

import json

import pytest
from markupsafe import Markup

from reward_server.human.rules import Scale
from reward_server.human.web.keys import rating_keys
from reward_server.human.web.ratelimit import RateLimit
from reward_server.human.web.text import prompt_turns, visible


def _marks(text: str) -> str:
    return str(Markup(visible(text)).striptags())


def test_markup_in_a_text_stays_text() -> None:
    assert visible("<b>&amp;\"'") == "&lt;b&gt;&amp;amp;&#34;&#39;"


@pytest.mark.parametrize(
    ("hidden", "name"),
    [
        ("\x00", "U+0000"),
        ("\x1b", "U+001B"),
        ("\r", "U+000D"),
        ("\x85", "U+0085"),
        ("\u00ad", "U+00AD"),
        ("\u200b", "U+200B"),
        ("\u202e", "U+202E"),
        ("\u2066", "U+2066"),
        ("\ufeff", "U+FEFF"),
        ("\U000e0041", "U+E0041"),
    ],
)
def test_what_hides_or_turns_text_around_is_named_instead(hidden: str, name: str) -> None:
    assert hidden not in visible(f"a{hidden}b")
    assert _marks(f"a{hidden}b") == f"a{name}b"


def test_line_breaks_tabs_joiners_and_accents_stay_as_they_are() -> None:
    text = "a\n\tb 👩\u200d🚀 می\u200cخواهم e\u0301"
    assert visible(text) == text


def test_line_breaks_of_windows_are_line_breaks() -> None:
    assert visible("a\r\nb") == "a\nb"


def test_a_conversation_is_shown_up_to_its_last_turn_of_a_user() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What time is it?", "name": "Ann"},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "clock"}]},
        {"role": "tool", "content": "12:00"},
        {"role": "assistant", "content": "Noon."},
    ]
    turns = prompt_turns(json.dumps(messages))
    assert [(turn.role, turn.content) for turn in turns] == [("system", "Be brief."), ("user", "What time is it?")]
    assert json.loads(turns[1].rest) == {"name": "Ann"}


@pytest.mark.parametrize("messages", [[], [{"role": "assistant", "content": "Hello."}]])
def test_a_prompt_without_a_turn_of_a_user_is_no_conversation(messages: list[dict[str, str]]) -> None:
    assert prompt_turns(json.dumps(messages)) == []


@pytest.mark.parametrize(
    ("scale", "keys"),
    [
        (Scale.of_steps(1, 5), ["1", "2", "3", "4", "5"]),
        (Scale.of_steps(0, 4), ["0", "1", "2", "3", "4"]),
        (Scale.of_steps(1, 10), [*"1234567890"]),
        (Scale.of_steps(0, 10), [*"0123456789", ""]),
        (Scale.of_steps(-1, 1), ["1", "2", "3"]),
        (Scale.of_steps(0, 1, 0.1), [*"1234567890", ""]),
        (Scale.of_labels({"bad": -1, "good": 1}), ["1", "2"]),
    ],
)
def test_a_key_rates_the_number_on_it_where_the_scale_has_it_and_counts_from_the_left_elsewhere(
    scale: Scale, keys: list[str]
) -> None:
    assert rating_keys(scale) == keys


def test_a_rate_limit_lets_a_burst_pass_and_then_one_at_a_time() -> None:
    now = 0.0
    limit = RateLimit(per_minute=3, clock=lambda: now)
    assert [limit.take("a") for _ in range(4)] == [0, 0, 0, 20]
    now = 19.5
    assert limit.take("a") == 1
    now = 20.5
    assert [limit.take("a"), limit.take("a")] == [0, 20]


def test_a_rate_limit_counts_each_caller_alone() -> None:
    limit = RateLimit(per_minute=1, clock=lambda: 0.0)
    assert [limit.take("a"), limit.take("b"), limit.take("a") > 0] == [0, 0, True]


def test_a_rate_limit_forgets_who_stayed_away() -> None:
    now = 0.0
    limit = RateLimit(per_minute=5, clock=lambda: now)
    for caller in range(1000):
        limit.take(caller)
    now = 61.0
    limit.take("late")
    assert len(limit) == 1
