"""Weighted sums of rewards: the arithmetic, partial outcomes, and children that are late."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_server.assembly import make_reward
from reward_server.composite import Child, Component, CompositeOptions, CompositeReward
from reward_server.kinds import Description, Limits, RewardKind, RewardLoadError, Sample, Scope
from reward_server.memory import SampleKey
from reward_server.normalisation import RunningMoments
from reward_server.results import Abstained, Failed, Outcome, Pending, Scored
from rlhf import failures
from rlhf.failures import RpcFailure
from tests.reward_server.conftest import EXAMPLES


class Scripted(RewardKind):
    """Says of each completion what the script says, and remembers what it was asked."""

    kind = "scripted"
    concurrency = 4
    batch_size = 64

    def __init__(self, script: Callable[[str], Outcome], **description: Any) -> None:
        self.description = Description("scripted", "1", **description)
        self._script = script
        self.asked: list[str] = []
        self.closed = False

    async def score(self, samples: Sequence[Sample], answer_by: float | None) -> list[Outcome]:
        self.asked += [sample.completion for sample in samples]
        return [self._script(sample.completion) for sample in samples]

    async def close(self) -> None:
        self.closed = True


def sample(completion: str) -> Sample:
    return Sample("", completion, key=SampleKey("run", completion), fingerprint=completion.encode())


async def composite(
    *children: tuple[Mapping[str, Any], RewardKind], start: bool = True, **options: Any
) -> CompositeReward:
    components = [Component(name=f"c{n}", reward="x", **fields) for n, (fields, _) in enumerate(children)]
    made = [Child(component, kind) for component, (_, kind) in zip(components, children, strict=True)]
    reward = CompositeReward(CompositeOptions(components=components, **options), made, Limits())
    if start:
        await reward.start()
    return reward


async def outcome_of(*children: tuple[Mapping[str, Any], Outcome], **options: Any) -> Outcome:
    reward = await composite(
        *((fields, Scripted(lambda _, said=said: said)) for fields, said in children),  # type: ignore[misc]
        **options,
    )
    (outcome,) = await reward.score([sample("a")], None)
    return outcome


async def test_the_reward_is_the_weighted_sum_of_mapped_and_clipped_children() -> None:
    outcome = await outcome_of(
        ({"weight": 2.0}, Scored(0.5, {"part": 7.0})),
        ({"weight": -1.0, "scale": 10.0, "shift": -1.0}, Scored(0.25)),
        ({"clip": (-1.0, 1.0)}, Scored(40.0)),
    )
    assert outcome == Scored(2 * 0.5 - 1.5 + 1.0, {"c0": 0.5, "c0.part": 7.0, "c1": 1.5, "c2": 1.0}, [])


async def test_token_rewards_are_summed_by_weight_and_scale() -> None:
    outcome = await outcome_of(
        ({"weight": 2.0}, Scored(1.0, {}, [1.0, 0.0])), ({"scale": 3.0}, Scored(0.0, {}, [1.0, 1.0])), ({}, Scored(0.0))
    )
    assert isinstance(outcome, Scored)
    assert outcome.token_rewards == [5.0, 3.0]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ([Scored(1.0), Failed("BROKEN", "no"), Pending(3.0)], Failed("BROKEN", "c1: no")),
        ([Pending(2.0), Pending(5.0), Abstained("dull")], Pending(5.0)),
        ([Abstained("dull"), Abstained("odd"), Abstained("")], Abstained("c0: dull; c1: odd; c2: ")),
    ],
)
async def test_failed_wins_over_pending_and_pending_over_abstained(said: list[Outcome], expected: Outcome) -> None:
    assert await outcome_of(*(({}, each) for each in said)) == expected


async def test_the_share_of_a_child_that_abstains_goes_to_the_others() -> None:
    outcome = await outcome_of(
        ({"weight": 1.0}, Scored(1.0)), ({"weight": -1.0}, Scored(0.5)), ({"weight": 2.0}, Abstained("dull"))
    )
    assert outcome == Scored(2 * (1.0 - 0.5), {"c0": 1.0, "c1": 0.5}, [])


async def test_a_child_that_abstains_takes_the_sample_with_it_when_told_so() -> None:
    outcome = await outcome_of(({}, Scored(1.0)), ({}, Abstained("dull")), on_abstain="abstain")
    assert outcome == Abstained("c1: dull")


async def test_a_sample_is_left_out_when_only_children_without_weight_judged_it() -> None:
    outcome = await outcome_of(({"weight": 0.0}, Scored(1.0)), ({}, Abstained("dull")))
    assert outcome == Abstained("c1: dull")


async def test_a_sum_beyond_a_double_fails() -> None:
    outcome = await outcome_of(({"weight": 1e300}, Scored(1e300)), ({}, Scored(0.0)))
    assert isinstance(outcome, Failed)
    assert outcome.code == "NOT_FINITE"


async def test_a_child_is_not_asked_again_for_what_it_has_judged() -> None:
    late = True
    quick = Scripted(lambda _: Scored(1.0))
    slow = Scripted(lambda _: Pending(0.5) if late else Scored(2.0))
    reward = await composite(({}, quick), ({}, slow))
    assert await reward.score([sample("a")], None) == [Pending(0.5)]
    late = False
    assert await reward.score([sample("a")], None) == [Scored(3.0, {"c0": 1.0, "c1": 2.0}, [])]
    assert quick.asked == ["a"]
    assert slow.asked == ["a", "a"]


async def test_children_are_asked_at_the_same_time() -> None:
    both = asyncio.Barrier(2)

    class Meets(Scripted):
        async def score(self, samples: Sequence[Sample], answer_by: float | None) -> list[Outcome]:
            await both.wait()
            return await super().score(samples, answer_by)

    reward = await composite(({}, Meets(lambda _: Scored(1.0))), ({}, Meets(lambda _: Scored(1.0))))
    async with asyncio.timeout(10):
        await reward.score([sample("a")], None)


async def test_a_child_that_breaks_ends_the_call_and_the_others_keep_what_they_judged() -> None:
    class Down(Scripted):
        async def score(self, samples: Sequence[Sample], answer_by: float | None) -> list[Outcome]:
            if not self.asked:
                self.asked.append("")
                raise failures.unavailable("the judge is down")
            return await super().score(samples, answer_by)

    other = Scripted(lambda _: Scored(1.0))
    reward = await composite(({}, other), ({}, Down(lambda _: Scored(1.0))))
    with pytest.raises(RpcFailure, match="judge is down"):
        await reward.score([sample("a")], None)
    assert isinstance((await reward.score([sample("a")], None))[0], Scored)
    assert other.asked == ["a"]


async def test_it_needs_what_its_children_need() -> None:
    def one(_: str) -> Outcome:
        return Scored(1.0)

    reward = await composite(
        ({}, Scripted(one, required_metadata=("a", "b"))),
        ({}, Scripted(one, required_metadata=("b", "c"), needs_token_ids=True)),
        ({}, Scripted(one, scope=Scope.GROUP)),
    )
    description = reward.description
    assert description.required_metadata == ("a", "b", "c")
    assert description.needs_token_ids
    assert description.scope is Scope.GROUP


async def test_the_version_changes_with_a_weight_and_with_a_child() -> None:
    def child(version: str) -> RewardKind:
        kind = Scripted(lambda _: Scored(1.0))
        kind.description = Description("scripted", version)
        return kind

    versions = [
        (await composite(({"weight": weight}, child(version)))).description.version
        for weight, version in [(1.0, "1"), (1.0, "1"), (2.0, "1"), (1.0, "2")]
    ]
    assert versions[0] == versions[1]
    assert len(set(versions)) == 3


async def test_closing_closes_the_children() -> None:
    child = Scripted(lambda _: Scored(1.0))
    reward = await composite(({}, child))
    await reward.close()
    assert child.closed


async def test_running_moments_go_on_after_a_restart(tmp_path: Path) -> None:
    def kind() -> RewardKind:
        return Scripted(lambda completion: Scored(float(completion)))

    rewards: list[float] = []
    seen = ["1", "5", "-2", "8", "3"]
    for completion in seen:
        reward = await composite(({"normalise": "running"}, kind()), state_file=tmp_path / "moments.json")
        (outcome,) = await reward.score([sample(completion)], None)
        assert isinstance(outcome, Scored)
        rewards.append(outcome.reward)
    numbers = [float(completion) for completion in seen]
    mean = sum(numbers) / 5
    deviation = math.sqrt(sum((number - mean) ** 2 for number in numbers) / 4)
    assert rewards[0] == 0.0
    assert rewards[-1] == pytest.approx((3 - mean) / deviation)


async def test_a_damaged_state_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "moments.json"
    file.write_text('{"c0": {"count": 1')
    reward = await composite(({"normalise": "running"}, Scripted(lambda _: Scored(1.0))), start=False, state_file=file)
    with pytest.raises(RewardLoadError, match=r"moments\.json"):
        await reward.start()


@given(st.lists(st.lists(st.floats(-1e6, 1e6), max_size=5), min_size=1, max_size=6))
def test_running_moments_are_those_of_all_numbers_together(batches: list[list[float]]) -> None:
    moments = RunningMoments()
    for batch in batches:
        moments.update(batch)
    numbers = [number for batch in batches for number in batch]
    mean = math.fsum(numbers) / len(numbers) if numbers else 0.0
    assert moments.mean == pytest.approx(mean, abs=1e-6)
    squares = math.fsum((number - mean) ** 2 for number in numbers)
    assert moments.squares == pytest.approx(squares, rel=1e-6, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "components"),
        ({"components": []}, "components"),
        ({"components": [{"name": "a b", "reward": "length"}]}, "name"),
        ({"components": [{"name": "a", "reward": "length", "wieght": 1}]}, "wieght"),
        ({"components": [{"name": "a", "reward": "lenght"}]}, "components[0] (a): 'lenght' is not a reward"),
        (
            {"components": [{"name": "a", "reward": "length"}]},
            "components[0] (a): options of the reward length",
        ),
        ({"components": [{"name": "a", "reward": "vader"}] * 2}, "'a' is there twice"),
        ({"components": [{"name": "a", "reward": "vader", "weight": 0}]}, "every weight is 0"),
        ({"components": [{"name": "a", "reward": "vader", "clip": [1, 1]}]}, "not below"),
        ({"components": [{"name": "a", "reward": "vader", "normalise": "running"}]}, "state_file"),
        ({"components": [{"name": "a", "reward": "vader"}], "on_abstian": "abstain"}, "did you mean 'on_abstain'"),
        ({"components": [{"name": "a", "reward": "vader", "weight": math.nan}]}, "weight"),
    ],
)
def test_a_wrong_file_is_explained(options: Mapping[str, Any], says: str) -> None:
    with pytest.raises(RewardLoadError) as refused:
        make_reward("composite", options, Limits())
    assert says in str(refused.value)


async def test_a_file_names_rewards_of_every_kind_that_the_command_line_takes(tmp_path: Path) -> None:
    file = tmp_path / "mix.yaml"
    file.write_text(
        f"""
name: mix
components:
  - {{name: short, reward: length, options: {{target: 2}}, weight: 0.5}}
  - {{name: own, reward: "{EXAMPLES}:lengths"}}
  - name: inner
    reward: composite
    options: {{components: [{{name: digit, reward: regex, options: {{pattern: '\\d'}}}}]}}
"""
    )
    reward = make_reward(str(file), {}, Limits())
    await reward.start()
    assert await reward.score([sample("a 1")], None) == [
        Scored(0.5 + 3.0 + 1.0, {"short": 1.0, "own": 3.0, "inner": 1.0, "inner.digit": 1.0}, [])
    ]
    assert reward.description.name == "mix"


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "No such file"), ("components: [", "not YAML"), ("- a", "must hold"), ("1: 2", "must hold")],
)
def test_a_file_that_is_none_is_explained(tmp_path: Path, content: str | None, says: str) -> None:
    file = tmp_path / "mix.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(RewardLoadError, match=says):
        make_reward(str(file), {}, Limits())


def test_a_file_takes_no_options_beside_it(tmp_path: Path) -> None:
    with pytest.raises(RewardLoadError, match="give none beside it"):
        make_reward("mix.yaml", {"name": "x"}, Limits())
