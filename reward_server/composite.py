"""The composite kind: a weighted sum of other rewards.

Each child has a queue and a memory of its own, so that a sample of which one child is late is not judged twice by the
others.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from reward_server.kinds import Description, Limits, RewardKind, RewardLoadError, Sample, Scope
from reward_server.normalisation import RunningMoments, affine
from reward_server.results import Abstained, Failed, FailureCode, Outcome, Pending, Scored
from reward_server.scheduler import Scheduler
from rlhf import __version__


class Component(BaseModel):
    """One reward of a composite, and what is made of its number."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$", description="Its name in results and metrics")
    reward: str = Field(description="What --reward takes")
    options: dict[str, Any] = Field(default_factory=dict, description="What --reward-options takes")
    weight: float = Field(default=1.0, description="Its share of the sum; below 0 for a penalty")
    normalise: Literal["none", "running"] = Field(
        default="none", description="`running`: less the mean, over the standard deviation of all its rewards so far"
    )
    scale: float = Field(default=1.0, description="Its (normalised) reward is multiplied by it")
    shift: float = Field(default=0.0, description="This is added then")
    clip: tuple[float, float] | None = Field(default=None, description="And the result is kept within [low, high]")

    @model_validator(mode="after")
    def _clip_is_a_range(self) -> Component:
        if self.clip is not None and self.clip[0] >= self.clip[1]:
            raise ValueError(f"clip: {self.clip[0]} is not below {self.clip[1]}")
        return self


class CompositeOptions(BaseModel):
    """A weighted sum."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(default="composite", min_length=1, description="The name that clients see")
    components: tuple[Component, ...] = Field(min_length=1, description="The rewards that are summed")
    on_abstain: Literal["renormalise", "abstain"] = Field(
        default="renormalise",
        description="When a component abstains: the others take its share of the weight, or the composite abstains",
    )
    state_file: Path | None = Field(
        default=None, description="Where running moments are kept over restarts; needed when a component has them"
    )

    @model_validator(mode="after")
    def _consistent(self) -> CompositeOptions:
        names = [component.name for component in self.components]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"components: the name {name!r} is there twice")
        if all(component.weight == 0 for component in self.components):
            raise ValueError("components: every weight is 0")
        running = [component.name for component in self.components if component.normalise == "running"]
        if running and self.state_file is None:
            raise ValueError(
                f"state_file: is missing; {running[0]} is normalised by running moments, which a restart would lose"
            )
        return self


@dataclass(frozen=True)
class Child:
    """A component and the reward that it names."""

    component: Component
    reward: RewardKind


class CompositeReward(RewardKind):
    """Asks all children at once and sums what they say.

    One Failed child fails the sample, else one Pending child keeps it Pending; children that abstain are left out, or
    take the sample with them.
    """

    kind = "composite"

    def __init__(self, options: CompositeOptions, children: Sequence[Child], limits: Limits) -> None:
        self._options = options
        self._children = children
        self._limits = limits
        self._schedulers: list[Scheduler] = []
        self._moments = {
            component.name: RunningMoments() for component in options.components if component.normalise == "running"
        }
        self.batch_size = limits.batch_size
        # The children bound what runs.
        self.concurrency = limits.max_queue_samples

    async def start(self) -> None:
        """Start all children; raises RewardLoadError naming the one that can't be."""
        self._read_moments()
        await asyncio.gather(*map(self._start, self._children))
        self._schedulers = [
            Scheduler(child.reward, self._limits, component=child.component.name) for child in self._children
        ]
        self.description = _described(self._options, [child.reward.description for child in self._children])

    async def close(self) -> None:
        """Close all children."""
        await asyncio.gather(*(child.reward.close() for child in self._children))

    async def score(self, samples: Sequence[Sample], answer_by: float | None) -> list[Outcome]:
        """One outcome per sample, in order."""
        asked = (scheduler.score(samples, answer_by) for scheduler in self._schedulers)
        # All are waited for, whatever one of them raises: what the others say is remembered for the next time.
        answers = await asyncio.gather(*asked, return_exceptions=True)
        by_child: list[list[Outcome]] = []
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
            by_child.append(answer)
        return self._sums(list(zip(*by_child, strict=True)))

    async def _start(self, child: Child) -> None:
        try:
            await child.reward.start()
        except RewardLoadError as error:
            raise RewardLoadError(f"{child.component.name}: {error}") from error

    def _sums(self, rows: Sequence[Sequence[Outcome]]) -> list[Outcome]:
        """The outcome of each sample out of those of its children; running moments learn of those that get a sum."""
        undecided = [self._without_sum(row) for row in rows]
        summed = [row for row, outcome in zip(rows, undecided, strict=True) if outcome is None]
        if summed and self._moments:
            self._learn(summed)
        return [self._sum(row) if outcome is None else outcome for row, outcome in zip(rows, undecided, strict=True)]

    def _without_sum(self, row: Sequence[Outcome]) -> Outcome | None:
        """What becomes of a sample that can't be summed; None = it can."""
        named = list(zip(self._options.components, row, strict=True))
        for component, outcome in named:
            if isinstance(outcome, Failed):
                return replace(outcome, message=f"{component.name}: {outcome.message}")
        waits = [outcome.retry_after for outcome in row if isinstance(outcome, Pending)]
        if waits:
            return Pending(max(waits))
        abstained = [
            f"{component.name}: {outcome.reason}" for component, outcome in named if isinstance(outcome, Abstained)
        ]
        if abstained and (self._options.on_abstain == "abstain" or self._weight_of_scored(row) == 0):
            return Abstained("; ".join(abstained))
        return None

    def _weight_of_scored(self, row: Sequence[Outcome]) -> float:
        return math.fsum(
            abs(component.weight)
            for component, outcome in zip(self._options.components, row, strict=True)
            if isinstance(outcome, Scored)
        )

    def _sum(self, row: Sequence[Outcome]) -> Outcome:
        whole = math.fsum(abs(component.weight) for component in self._options.components)
        share = whole / self._weight_of_scored(row)
        terms: list[float] = []
        components: dict[str, float] = {}
        token_terms: list[list[float]] = []
        for component, outcome in zip(self._options.components, row, strict=True):
            if not isinstance(outcome, Scored):
                continue
            value = self._value(component, outcome.reward)
            components[component.name] = value
            components.update({f"{component.name}.{name}": part for name, part in outcome.components.items()})
            weight = component.weight * share
            terms.append(weight * value)
            if outcome.token_rewards:
                token_terms.append([weight * component.scale * reward for reward in outcome.token_rewards])
        try:
            reward = math.fsum(terms)
            finite = all(map(math.isfinite, (reward, *components.values())))
        except (OverflowError, ValueError):
            finite = False
        if not finite:
            return Failed(FailureCode.NOT_FINITE, "the weighted sum is beyond a double")
        return Scored(reward, components, [math.fsum(parts) for parts in zip(*token_terms, strict=True)])

    def _value(self, component: Component, reward: float) -> float:
        moments = self._moments.get(component.name)
        normalised = reward if moments is None else moments.normalised(reward)
        return affine(normalised, scale=component.scale, shift=component.shift, clip=component.clip)

    def _learn(self, rows: Sequence[Sequence[Outcome]]) -> None:
        for index, component in enumerate(self._options.components):
            if component.name in self._moments:
                said = [outcome.reward for row in rows if isinstance(outcome := row[index], Scored)]
                self._moments[component.name].update(said)
        self._write_moments()

    def _read_moments(self) -> None:
        path = self._options.state_file
        if path is None or not path.exists():
            return
        try:
            kept: Mapping[str, Mapping[str, Any]] = json.loads(path.read_text())
            self._moments.update(
                {name: RunningMoments(**moments) for name, moments in kept.items() if name in self._moments}
            )
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise RewardLoadError(f"{path} does not hold running moments: {error}") from error

    def _write_moments(self) -> None:
        path = self._options.state_file
        assert path is not None, "the options demand it"
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(json.dumps({name: asdict(moments) for name, moments in self._moments.items()}))
        partial.replace(path)


def _described(options: CompositeOptions, children: Sequence[Description]) -> Description:
    digest = hashlib.sha256(__version__.encode())
    digest.update(options.model_dump_json(exclude={"state_file"}).encode())
    for child in children:
        digest.update(b"\0" + child.version.encode())
    return Description(
        name=options.name,
        version=f"{options.name}@{digest.hexdigest()[:16]}",
        required_metadata=tuple(dict.fromkeys(key for child in children for key in child.required_metadata)),
        needs_token_ids=any(child.needs_token_ids for child in children),
        scope=Scope.GROUP if any(child.scope is Scope.GROUP for child in children) else Scope.SAMPLE,
    )
