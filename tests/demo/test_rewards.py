from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from demo import rewards
from demo.corpus import Review
from demo.data import split_reviews
from demo.rewards import RewardError, needs_ratings, plan_reward
from reward_server.composite import CompositeOptions


def plan(reward: str, options: str | None, cache: Path) -> rewards.RewardPlan:
    return plan_reward(reward, options, cache, None, Console(quiet=True))


def test_options_mean_what_they_mean_to_the_reward_server(tmp_path: Path) -> None:
    made = plan("remote", "target: elsewhere:1", tmp_path)
    assert made.arguments == ("--reward", "remote", "--reward-options", "target: elsewhere:1")
    assert made.behind == ()
    assert not needs_ratings("model", "model: mine")


def test_the_mixture_is_a_composite_that_can_be_made() -> None:
    options = CompositeOptions(**rewards._mixture({"model": "m"}))
    assert [component.name for component in options.components] == ["praise", "length", "liking"]


def test_an_example_that_is_not_built_is_named_with_the_command_that_builds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rewards, "EXAMPLES", tmp_path)
    with pytest.raises(RewardError, match="make examples EXAMPLES=go"):
        plan("go", None, tmp_path)


def test_a_reward_model_is_trained_once_and_gives_from_minus_1_to_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("awful", "dull", "fair", "good", "superb")
    reviews = [Review(number, float(number % 5 - 2), f"{words[number % 5]} film {number}") for number in range(200)]
    split = split_reviews(reviews, held_out=50)
    first = plan_reward("model", None, tmp_path, split, Console())
    assert "Training a reward model" in capsys.readouterr().out
    assert plan_reward("model", None, tmp_path, split, Console()) == first
    assert "Training a reward model" not in capsys.readouterr().out
    options = json.loads(first.arguments[-1])
    assert Path(options["model"]).is_dir()
    # Ratings go from -2 to 2 here.
    assert options["scale"] == pytest.approx(
        json.loads((Path(options["model"]) / "metrics.json").read_text())["scale"] / 2
    )
