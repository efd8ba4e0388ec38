from __future__ import annotations

from dataclasses import replace

import pytest

from reward_server.human.rules import MOST_CHOICES, Aggregate, Choice, OnExpiry, Rules, Scale
from reward_server.results import Abstained, Failed, Scored


def test_a_scale_of_steps_has_exact_values() -> None:
    assert [choice.value for choice in Scale.of_steps(0, 0.5, 0.1).choices] == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
    assert [choice.label for choice in Scale.of_steps(-1, 1, 0.5).choices] == ["-1", "-0.5", "0", "0.5", "1"]


def test_named_choices_are_ordered_by_value() -> None:
    scale = Scale.of_labels({"good": 1, "bad": -1, "fair": 0})
    assert scale.choices == (Choice(-1.0, "bad"), Choice(0.0, "fair"), Choice(1.0, "good"))


@pytest.mark.parametrize(
    ("low", "high", "step", "says"),
    [
        (1, 5, 3, "do not meet"),
        (5, 1, 1, "min up to max"),
        (1, 5, 0, "steps above 0"),
        (0, MOST_CHOICES, 1, "at most"),
        (0, 1, 1e-300, "at most"),
        (0, float("inf"), 1, "min up to max"),
    ],
)
def test_steps_that_make_no_scale_are_refused(low: float, high: float, step: float, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Scale.of_steps(low, high, step)


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ({"one": 1.0}, "from 2"),
        ({"one": 1.0, "same": 1.0}, "different values"),
        ({"one": 1.0, "nothing": float("nan")}, "finite"),
    ],
)
def test_names_that_make_no_scale_are_refused(labels: dict[str, float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Scale.of_labels(labels)


def test_a_value_between_two_choices_is_none() -> None:
    scale = Scale.of_steps(0, 1, 0.1)
    assert scale.find(0.30000000000000004) == Choice(0.3, "0.3")
    assert scale.find(0.35) is None
    assert scale.find(float("nan")) is None


@pytest.mark.parametrize(("rating", "reward"), [(1, -1.0), (2, -0.5), (3, 0.0), (5, 1.0)])
def test_the_reward_is_the_rating_stretched_over_the_range(rating: float, reward: float) -> None:
    outcome = Rules().decide([rating], 0)
    assert isinstance(outcome, Scored)
    assert outcome.reward == reward


def test_the_mean_and_the_median_differ_as_they_should() -> None:
    rules = Rules(ratings_per_sample=3, reward_range=(0.0, 8.0))
    mean, median = rules.decide([1, 2, 5], 0), replace(rules, aggregate=Aggregate.MEDIAN).decide([1, 2, 5], 0)
    assert isinstance(mean, Scored)
    assert isinstance(median, Scored)
    assert mean.reward == pytest.approx((8 / 3 - 1) * 2)
    assert median.reward == 2.0
    assert median.components == {"rating": 2.0, "ratings": 3.0, "spread": 4.0}


def test_too_few_judgements_decide_nothing() -> None:
    assert Rules(ratings_per_sample=2, skips_to_abstain=2).decide([3], 1) is None


def test_enough_skips_outweigh_ratings() -> None:
    assert isinstance(Rules(ratings_per_sample=2).decide([3], 1), Abstained)


def test_what_expires_abstains_or_fails_by_choice() -> None:
    assert isinstance(Rules(expire_seconds=5).expired(), Abstained)
    failed = Rules(expire_seconds=5, on_expiry=OnExpiry.FAIL).expired()
    assert isinstance(failed, Failed)
    assert failed.code == "EXPIRED"


def test_expiry_off_means_never() -> None:
    assert not Rules().has_expired(created_at=0, now=1e12)
    assert Rules(expire_seconds=10).has_expired(created_at=0, now=10)


@pytest.mark.parametrize(
    "changed",
    [
        {"scale": Scale.of_steps(1, 7)},
        {"scale": Scale.of_labels({"a": 1, "b": 2, "c": 3, "d": 4, "e": 5})},
        {"reward_range": (0.0, 1.0)},
        {"ratings_per_sample": 2},
        {"aggregate": Aggregate.MEDIAN},
        {"skips_to_abstain": 2},
        {"question": "Is it kind?"},
        {"instructions": "Be strict."},
    ],
)
def test_the_version_changes_with_what_may_change_a_reward(changed: dict[str, object]) -> None:
    assert replace(Rules(), **changed).version != Rules().version  # type: ignore[arg-type]


def test_the_version_does_not_change_with_times() -> None:
    rules = Rules(expire_seconds=60, on_expiry=OnExpiry.FAIL, lease_seconds=1, undo_seconds=1, retry_after=1)
    assert rules.version == Rules().version


def test_the_version_of_the_default_rules_is_the_one_that_runs_have_pinned() -> None:
    assert Rules().version == "human@30ad818e307a8f89"
