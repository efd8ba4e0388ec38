"""The queue between calls and reward, below the wire: when work starts, is shared, and is given up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import pytest

from reward_server.kinds import Description, Limits, RewardKind, Sample, Scope
from reward_server.memory import SampleKey
from reward_server.results import Outcome, Pending, Scored
from reward_server.scheduler import Scheduler
from rlhf.failures import RpcFailure
from tests.reward_server.conftest import until


class GatedReward(RewardKind):
    """Judges when the gate is opened, and remembers what it was asked."""

    kind = "gated"

    def __init__(
        self, *, concurrency: int = 1, stoppable: bool = False, batch_size: int = 8, scope: Scope = Scope.SAMPLE
    ) -> None:
        self.description = Description("gated", "1", scope=scope)
        self.batch_size = batch_size
        self.concurrency = concurrency
        self.stoppable = stoppable
        self.gate = asyncio.Event()
        self.judged: list[str] = []
        self.stopped = 0

    async def score(self, samples: Sequence[Sample], answer_by: float | None) -> list[Outcome]:
        self.judged.extend(sample.completion for sample in samples)
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.stopped += 1
            raise
        return [Scored(1.0) for _ in samples]


def entry(name: str, group: str = "") -> Sample:
    return Sample(prompt="", completion=name, key=SampleKey("run", name), group_id=group, fingerprint=name.encode())


def scheduler(reward: GatedReward, *, max_queue_samples: int = 2, remember_samples: int = 100) -> Scheduler:
    return Scheduler(reward, Limits(max_queue_samples=max_queue_samples, remember_samples=remember_samples))


def soon() -> float:
    return time.monotonic() + 0.01


async def begin(scheduler: Scheduler, *names: str) -> asyncio.Task[list[Outcome]]:
    task = asyncio.create_task(scheduler.score([entry(name) for name in names]))
    for _ in range(5):
        await asyncio.sleep(0)
    return task


async def cancel(task: asyncio.Task[list[Outcome]]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_work_that_nobody_waits_for_is_not_started_and_leaves_the_queue() -> None:
    reward = GatedReward()
    queue = scheduler(reward)
    running = await begin(queue, "a")
    await cancel(await begin(queue, "b"))
    last = await begin(queue, "c")
    reward.gate.set()
    await asyncio.gather(running, last)
    assert reward.judged == ["a", "c"]


async def test_a_sample_that_another_call_waits_for_is_kept_when_the_first_call_ends() -> None:
    reward = GatedReward()
    queue = scheduler(reward, max_queue_samples=10)
    running = await begin(queue, "a")
    first = await begin(queue, "b", "c")
    second = await begin(queue, "b")
    await cancel(first)
    reward.gate.set()
    await asyncio.gather(running, second)
    assert reward.judged == ["a", "b"]


async def test_work_that_can_be_stopped_is_stopped_and_begins_anew_when_asked_for_again() -> None:
    reward = GatedReward(stoppable=True)
    queue = scheduler(reward)
    first = await begin(queue, "a")
    first.cancel()
    again = await begin(queue, "a")
    assert reward.stopped == 1
    reward.gate.set()
    assert await again == [Scored(1.0)]
    assert reward.judged == ["a", "a"]


async def test_no_more_batches_run_than_the_reward_can_use() -> None:
    reward = GatedReward(concurrency=2, batch_size=1)
    queue = scheduler(reward, max_queue_samples=10)
    task = await begin(queue, "a", "b", "c")
    assert reward.judged == ["a", "b"]
    reward.gate.set()
    assert len(await task) == 3


async def test_the_time_to_come_back_grows_with_the_queue_and_is_bounded() -> None:
    reward = GatedReward()
    queue = scheduler(reward, max_queue_samples=3)
    running = await begin(queue, "a", "b", "c")
    with pytest.raises(RpcFailure) as refused:
        await queue.score([entry("d")])
    assert refused.value.retry_after is not None
    assert 0 < refused.value.retry_after <= 30
    reward.gate.set()
    await running


async def test_a_reward_that_breaks_fails_the_call_and_not_the_next() -> None:
    class Broken(GatedReward):
        async def score(self, samples: Sequence[Sample], answer_by: float | None) -> list[Outcome]:
            raise ZeroDivisionError

    queue = scheduler(Broken())
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            await queue.score([entry("a")])


async def test_what_is_judged_in_time_is_answered_beside_what_is_pending() -> None:
    reward = GatedReward()
    queue = scheduler(reward, max_queue_samples=10)
    reward.gate.set()
    await queue.score([entry("a")])
    reward.gate.clear()
    quick, slow = await queue.score([entry("a"), entry("b")], soon())
    assert quick == Scored(1.0)
    assert isinstance(slow, Pending)
    assert 0 < slow.retry_after <= 30


@pytest.mark.parametrize("stoppable", [True, False])
async def test_work_that_was_answered_pending_goes_on(stoppable: bool) -> None:
    reward = GatedReward(stoppable=stoppable, batch_size=1)
    queue = scheduler(reward, max_queue_samples=10)
    await queue.score([entry("a"), entry("b")], soon())
    reward.gate.set()
    assert await queue.score([entry("a"), entry("b")]) == [Scored(1.0), Scored(1.0)]
    assert reward.judged == ["a", "b"]


async def test_work_that_was_answered_pending_is_given_up_when_nobody_comes_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("reward_server.scheduler._PATIENCE_SECONDS", 0.0)
    reward = GatedReward(stoppable=True)
    queue = scheduler(reward)
    await queue.score([entry("a")], soon())
    await until(lambda: reward.stopped)


async def test_a_batch_that_fails_while_no_call_waits_is_logged_and_begun_anew(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class BreaksOnce(GatedReward):
        async def score(self, samples: Sequence[Sample], answer_by: float | None) -> list[Outcome]:
            if not self.judged:
                await super().score(samples, answer_by)
                raise ZeroDivisionError
            return await super().score(samples, answer_by)

    reward = BreaksOnce()
    queue = scheduler(reward)
    await queue.score([entry("a")], soon())
    reward.gate.set()
    await until(lambda: "no call waited" in caplog.text)
    assert await queue.score([entry("a")]) == [Scored(1.0)]


async def test_a_batch_holds_whole_groups() -> None:
    reward = GatedReward(batch_size=3, scope=Scope.GROUP)
    batches: list[list[str]] = []

    async def score(samples: Sequence[Sample], answer_by: float | None) -> list[Outcome]:
        batches.append([sample.completion for sample in samples])
        return [Scored(1.0) for _ in samples]

    reward.score = score  # type: ignore[method-assign]
    queue = scheduler(reward, max_queue_samples=20)
    named = [("a1", "a"), ("b1", "b"), ("a2", "a"), ("b2", "b"), ("c1", "c"), *((f"d{n}", "d") for n in range(4))]
    await queue.score([entry(name, group) for name, group in named])
    assert batches == [["a1", "a2"], ["b1", "b2", "c1"], ["d0", "d1", "d2", "d3"]]


async def test_a_group_of_which_a_part_was_forgotten_is_judged_anew_and_whole() -> None:
    reward = GatedReward(scope=Scope.GROUP)
    reward.gate.set()
    queue = scheduler(reward, max_queue_samples=10, remember_samples=2)
    group = [entry("a1", "a"), entry("a2", "a")]
    await queue.score(group)
    await queue.score(group)
    assert reward.judged == ["a1", "a2"]
    await queue.score([entry("b1", "b")])
    await queue.score(group)
    assert reward.judged == ["a1", "a2", "b1", "a1", "a2"]
