from __future__ import annotations

import builtins
from typing import Any

import pytest

from reward_server.builtins import LengthReward, RegexReward, VaderReward


def test_length_is_best_at_the_target() -> None:
    assert LengthReward(target=2)(["", "", "", ""], ["", "a", "a b", "a b c d"]) == [0.0, 0.5, 1.0, 0.0]
    assert LengthReward(target=4, unit="characters")([""], ["abcd"]) == [1.0]


def test_regex_tells_matches_from_the_rest() -> None:
    reward = RegexReward(pattern=r"\bgood\b", match=2.0, otherwise=-1.0)
    assert reward(["", ""], ["so good!", "goodness"]) == [2.0, -1.0]


def test_vader_may_see_the_prompt_too() -> None:
    alone, both = VaderReward(), VaderReward(text="both")
    assert alone(["A great film"], [" it is"]) == [0.0]
    assert both(["A great film"], [" it is"])[0] > 0.5


def test_vader_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name.startswith("vaderSentiment"):
            raise ModuleNotFoundError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=r"rlhf-services\[reward\]"):
        VaderReward()
