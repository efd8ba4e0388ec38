"""Between the calls that arrive and the reward that judges: queueing, batching, sharing and giving up.

A sample is computed once however many calls wait for it, and not at all when nobody waits any more. A call that was
told to come back waits on for a while.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from reward_server import metrics
from reward_server.kinds import Limits, RewardKind, Sample, Scope
from reward_server.memory import OutcomeMemory, SampleKey
from reward_server.results import Failed, FailureCode, Outcome, Pending
from rlhf import failures, tracing
from rlhf.logs import get_logger

_log = get_logger(__name__)

# How long after the time to come back a PENDING sample is still worked on for a client that may be gone.
_PATIENCE_SECONDS = 60.0

SAMPLE_ID_CLASH = Failed(
    FailureCode.SAMPLE_ID_CLASH,
    "this sample_id named other content before; put a hash of prompt and completion into it",
)


@dataclass(eq=False, slots=True)
class _Job:
    sample: Sample
    batch: _Batch
    outcome: Outcome | None = None
    """Set when the batch has finished, unless it failed."""
    waiting_calls: int = 0
    expected_calls: int = 0
    """Calls that were answered PENDING and will be made again."""

    def wanted(self) -> bool:
        return self.waiting_calls + self.expected_calls > 0


@dataclass(eq=False)
class _Batch:
    answer_by: float | None
    finished: asyncio.Future[None]
    jobs: list[_Job] = field(default_factory=list)
    task: asyncio.Task[None] | None = None
    started: bool = False

    def abandoned(self) -> bool:
        return not any(job.wanted() for job in self.jobs)


class Scheduler:
    """Runs a started reward over batches of its size, as many at a time as it can use.

    At most `limits.max_queue_samples` samples wait or run; beyond that a call is refused at once with
    RESOURCE_EXHAUSTED and an estimate of when to come back. A call larger than the whole queue is let in when the queue
    is empty. component: the reward's name within a composite, a label of its metrics; empty = it is served itself.
    """

    def __init__(self, reward: RewardKind, limits: Limits, *, component: str = "") -> None:
        self._reward = reward
        self._by_group = reward.description.scope is Scope.GROUP
        self._max_queue_samples = limits.max_queue_samples
        self._memory = OutcomeMemory(limits.remember_samples)
        self._metrics = metrics.RewardMetrics(reward.kind, component, max_queue_samples=limits.max_queue_samples)
        self._slots = asyncio.Semaphore(reward.concurrency)
        self._jobs: dict[SampleKey, _Job] = {}
        self._running: set[asyncio.Task[None]] = set()
        self._seconds_per_sample = 0.01

    async def score(self, samples: Sequence[Sample], answer_by: float | None = None) -> list[Outcome]:
        """One outcome per sample, in order; what is not judged by then is Pending, and goes on.

        answer_by: a time.monotonic(); None = wait for ever. With Scope.GROUP the samples are whole groups. Raises
        RpcFailure (overloaded) when the queue is full.
        """
        if self._by_group:
            self._forget_what_is_left_of_groups(samples)
        known = [self._known(sample) for sample in samples]
        fresh = iter(
            self._admit([sample for sample, answer in zip(samples, known, strict=True) if answer is None], answer_by)
        )
        answers = [next(fresh) if answer is None else answer for answer in known]
        jobs = [answer for answer in answers if isinstance(answer, _Job)]
        self._metrics.repeated.inc(sum(answer is not None for answer in known))
        for job in jobs:
            job.waiting_calls += 1
        try:
            # asyncio.wait does not cancel the futures when this call is cancelled: others may wait for them too.
            if jobs:
                seconds = None if answer_by is None else max(0.0, answer_by - time.monotonic())
                await asyncio.wait({job.batch.finished for job in jobs}, timeout=seconds)
            late = [job for job in jobs if not job.batch.finished.done()]
            come_back = Pending(self._seconds_to_come_back())
            if late:
                self._expect_again(late, come_back.retry_after + _PATIENCE_SECONDS)
        finally:
            for job in jobs:
                job.waiting_calls -= 1
                if not job.batch.finished.done():
                    self._give_up_unless_wanted(job)
        return [_answered(answer, come_back) if isinstance(answer, _Job) else answer for answer in answers]

    def _expect_again(self, jobs: Sequence[_Job], seconds: float) -> None:
        """Work on for `seconds` as if a call waited."""
        for job in jobs:
            job.expected_calls += 1
        asyncio.get_running_loop().call_later(seconds, self._expect_no_longer, jobs)

    def _expect_no_longer(self, jobs: Sequence[_Job]) -> None:
        for job in jobs:
            job.expected_calls -= 1
            self._give_up_unless_wanted(job)

    def _known(self, sample: Sample) -> Outcome | _Job | None:
        remembered = self._memory.recall(sample.key)
        if remembered is not None:
            fingerprint, outcome = remembered
            return outcome if fingerprint == sample.fingerprint else SAMPLE_ID_CLASH
        job = self._jobs.get(sample.key)
        if job is not None:
            return job if job.sample.fingerprint == sample.fingerprint else SAMPLE_ID_CLASH
        return None

    def _forget_what_is_left_of_groups(self, samples: Sequence[Sample]) -> None:
        """A group of which a sample was forgotten is judged anew, whole: a part of it cannot be."""
        unknown = {
            sample.group_id
            for sample in samples
            if sample.key not in self._jobs and self._memory.recall(sample.key) is None
        }
        for sample in samples:
            if sample.group_id in unknown:
                self._memory.forget(sample.key)

    def _admit(self, fresh: Sequence[Sample], answer_by: float | None) -> list[_Job]:
        """A job for each sample, in order, in batches that run as soon as they can."""
        if self._jobs and len(self._jobs) + len(fresh) > self._max_queue_samples:
            raise failures.overloaded(
                f"{len(self._jobs)} samples wait already; the queue holds {self._max_queue_samples}",
                retry_after=self._seconds_to_come_back(),
            )
        jobs: dict[SampleKey, _Job] = {}
        for samples in self._cut(fresh):
            batch = _Batch(answer_by, asyncio.get_running_loop().create_future())
            batch.jobs = [_Job(sample, batch) for sample in samples]
            jobs.update((job.sample.key, job) for job in batch.jobs)
            batch.task = asyncio.create_task(self._run(batch))
            self._running.add(batch.task)
            batch.task.add_done_callback(self._running.discard)
        self._jobs.update(jobs)
        self._metrics.queue_samples.set(len(self._jobs))
        return [jobs[sample.key] for sample in fresh]

    def _cut(self, samples: Sequence[Sample]) -> Iterator[Sequence[Sample]]:
        """Batches of at most the reward's size; only a group that is larger than that makes a larger one."""
        size = self._reward.batch_size
        if not self._by_group:
            yield from (samples[first : first + size] for first in range(0, len(samples), size))
            return
        batch: list[Sample] = []
        for _, group in groupby(sorted(samples, key=_group_id), key=_group_id):
            together = list(group)
            if batch and len(batch) + len(together) > size:
                yield batch
                batch = []
            batch += together
        if batch:
            yield batch

    def _seconds_to_come_back(self) -> float:
        wait = len(self._jobs) * self._seconds_per_sample / self._reward.concurrency
        return min(max(wait, 0.1), 30.0)

    def _give_up_unless_wanted(self, job: _Job) -> None:
        """When nobody waits any more, what has not begun is forgotten, and what can be stopped is stopped."""
        batch = job.batch
        if job.wanted() or batch.finished.done():
            return
        assert batch.task is not None
        if not batch.started:
            self._forget([job])
        if batch.abandoned() and (not batch.started or self._reward.stoppable):
            # Before the task ends, or a call that comes meanwhile would wait for a job that never finishes.
            self._forget(batch.jobs)
            batch.task.cancel()

    def _forget(self, jobs: Sequence[_Job]) -> None:
        for job in jobs:
            # A newer job may stand under the same key by now.
            if self._jobs.get(job.sample.key) is job:
                del self._jobs[job.sample.key]
        self._metrics.queue_samples.set(len(self._jobs))

    async def _run(self, batch: _Batch) -> None:
        try:
            async with self._slots:
                if not self._by_group:
                    batch.jobs = [job for job in batch.jobs if job.wanted()]
                batch.started = True
                outcomes = await self._judge([job.sample for job in batch.jobs], batch.answer_by)
            for job, outcome in zip(batch.jobs, outcomes, strict=True):
                self._memory.remember(job.sample.key, job.sample.fingerprint, outcome)
                job.outcome = outcome
            batch.finished.set_result(None)
            self._metrics.observe(outcomes)
            self._metrics.remembered_samples.set(len(self._memory))
        except asyncio.CancelledError:
            # We cancel only what nobody waits for; the rest is the process ending, or the reward itself.
            self._fail(batch, failures.unavailable("the reward was cancelled"))
        except Exception as error:
            self._fail(batch, error)
        finally:
            self._forget(batch.jobs)

    def _fail(self, batch: _Batch, error: Exception) -> None:
        wanted = [job for job in batch.jobs if job.wanted()]
        batch.finished.set_exception(error)
        # Asked for here, or asyncio complains of it when only calls that will come back want it.
        batch.finished.exception()
        if wanted and not any(job.waiting_calls for job in wanted):
            _log.error("a batch failed while no call waited for it", samples=len(wanted), exc_info=error)

    async def _judge(self, samples: Sequence[Sample], answer_by: float | None) -> list[Outcome]:
        self._metrics.batch_samples.observe(len(samples))
        began = time.perf_counter()
        # A child of the call that brought the samples first.
        with (
            tracing.span("judge", kind=self._reward.kind, samples=len(samples)),
            self._metrics.running_batches.track_inprogress(),
        ):
            outcomes = await self._reward.score(samples, answer_by)
            seconds = time.perf_counter() - began
            self._metrics.batch_seconds.observe(seconds, tracing.exemplar())
        # A moving average is enough to tell a refused client when to come back.
        self._seconds_per_sample += 0.2 * (seconds / len(samples) - self._seconds_per_sample)
        return outcomes


def _answered(job: _Job, come_back: Pending) -> Outcome:
    """What the job came to, or when to come back; raises what its batch failed with."""
    if not job.batch.finished.done():
        return come_back
    job.batch.finished.result()
    assert job.outcome is not None
    return job.outcome


def _group_id(sample: Sample) -> str:
    return sample.group_id
