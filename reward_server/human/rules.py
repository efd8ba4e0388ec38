"""The rules of a rating: the scale, how many ratings make a reward and which, and when a ticket ends without one."""

from __future__ import annotations

import enum
import hashlib
import itertools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal

from reward_server.results import Abstained, Failed, FailureCode, Scored

MOST_CHOICES = 21
"""A page can show, and a person tell apart, no more."""

# To be raised when the same ratings come out as another reward than before. Our release number would stop runs that
# wait for people at every upgrade.
_REVISION = 1


@dataclass(frozen=True)
class Choice:
    """One button of the scale."""

    value: float
    label: str


@dataclass(frozen=True)
class Scale:
    """What a rater chooses from: at least two choices, ascending by value."""

    choices: tuple[Choice, ...]

    def __post_init__(self) -> None:
        values = [choice.value for choice in self.choices]
        if not 2 <= len(values) <= MOST_CHOICES:
            raise ValueError(f"a scale has from 2 to {MOST_CHOICES} choices, not {len(values)}")
        if not all(math.isfinite(value) for value in values):
            raise ValueError("the values of a scale are finite numbers")
        if any(low >= high for low, high in itertools.pairwise(values)):
            raise ValueError("two choices of a scale have different values")

    @classmethod
    def of_steps(cls, low: float, high: float, step: float = 1.0) -> Scale:
        """`low`, `low` + `step`, … up to `high`, which must be one of them."""
        if not (all(map(math.isfinite, (low, high, step))) and step > 0 and low < high):
            raise ValueError("a scale goes from min up to max in steps above 0")
        if (high - low) / step >= MOST_CHOICES:
            raise ValueError(f"a scale has at most {MOST_CHOICES} choices; these steps are too small")
        # In decimals, so that three steps of 0.1 are 0.3.
        first, last, width = (Decimal(repr(number)) for number in (low, high, step))
        count, rest = divmod(last - first, width)
        if rest:
            raise ValueError(f"steps of {step:g} from {low:g} do not meet {high:g}")
        values = [float(first + width * index) for index in range(int(count) + 1)]
        return cls(tuple(Choice(value, f"{value:g}") for value in values))

    @classmethod
    def of_labels(cls, labels: Mapping[str, float]) -> Scale:
        """Named choices with their values, in any order."""
        return cls(tuple(sorted((Choice(float(value), label) for label, value in labels.items()), key=_value)))

    @property
    def low(self) -> float:
        """The lowest value."""
        return self.choices[0].value

    @property
    def high(self) -> float:
        """The highest value."""
        return self.choices[-1].value

    def find(self, value: float) -> Choice | None:
        """The choice with this value, None when there is none."""
        return next((choice for choice in self.choices if math.isclose(choice.value, value, abs_tol=1e-12)), None)


def _value(choice: Choice) -> float:
    return choice.value


class Aggregate(enum.StrEnum):
    """How several ratings of a sample become one."""

    MEAN = "mean"
    MEDIAN = "median"


class OnExpiry(enum.StrEnum):
    """What a ticket that nobody finished in time is answered."""

    ABSTAIN = "abstain"
    FAIL = "fail"


_ONE_TO_FIVE = Scale.of_steps(1, 5)


@dataclass(frozen=True)
class Rules:
    """Settings of the queue, checked where they come from (options.py).

    reward_range: what the lowest and the highest value of the scale are worth; between them the map is affine.
    ratings_per_sample: ratings, each by another person, that close a ticket. skips_to_abstain: skips, each by another
    person, that close it without a reward, whatever ratings it has. expire_seconds: the same after a time; 0 = never.
    lease_seconds: for how long a ticket is kept for who was shown it. undo_seconds: how old an outcome is before it is
    answered to a trainer and can't be undone any more. retry_after: seconds until a trainer asks again.
    """

    scale: Scale = _ONE_TO_FIVE
    reward_range: tuple[float, float] = (-1.0, 1.0)
    ratings_per_sample: int = 1
    aggregate: Aggregate = Aggregate.MEAN
    skips_to_abstain: int = 1
    expire_seconds: float = 0.0
    on_expiry: OnExpiry = OnExpiry.ABSTAIN
    lease_seconds: float = 300.0
    undo_seconds: float = 0.0
    retry_after: float = 5.0
    question: str = ""
    instructions: str = ""

    @property
    def version(self) -> str:
        """Changes with whatever could change a reward. Tickets belong to a version; those of two are never mixed.

        Times are left out: they decide whether somebody rates a sample, not how.
        """
        described = {
            "revision": _REVISION,
            "scale": [[choice.value, choice.label] for choice in self.scale.choices],
            "reward_range": [float(bound) for bound in self.reward_range],
            "ratings_per_sample": self.ratings_per_sample,
            "aggregate": self.aggregate,
            "skips_to_abstain": self.skips_to_abstain,
            "question": self.question,
            "instructions": self.instructions,
        }
        return f"human@{hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]}"

    def decide(self, ratings: Sequence[float], skips: int) -> Scored | Abstained | None:
        """The outcome that these judgements of a sample make, None while they are too few."""
        if skips >= self.skips_to_abstain:
            return Abstained(f"skipped by {skips} of the people who were asked")
        return self._scored(ratings) if len(ratings) >= self.ratings_per_sample else None

    def expired(self) -> Abstained | Failed:
        """The outcome of a sample that waited for too long."""
        reason = f"not rated within {self.expire_seconds:g} s"
        return Failed(FailureCode.EXPIRED, reason) if self.on_expiry is OnExpiry.FAIL else Abstained(reason)

    def has_expired(self, created_at: float, now: float) -> bool:
        """Whether a ticket of this age is too old to be rated."""
        return self.expire_seconds > 0 and created_at + self.expire_seconds <= now

    def _scored(self, ratings: Sequence[float]) -> Scored:
        rating = statistics.median(ratings) if self.aggregate is Aggregate.MEDIAN else statistics.fmean(ratings)
        scale, (worst, best) = self.scale, self.reward_range
        part = (rating - scale.low) / (scale.high - scale.low)
        components = {"rating": rating, "ratings": float(len(ratings)), "spread": max(ratings) - min(ratings)}
        return Scored(worst + part * (best - worst), components)
