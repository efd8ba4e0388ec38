"""RewardClient: rewards from one reward server, in micro-batches cut by its limits, for as long as it takes.

`score` takes one sample and returns what finally became of it. Samples that arrive while calls run are sent together
as soon as a call may be made, so scoring keeps pace with generation without a batch size to tune.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import grpc

from rlhf import tracing
from rlhf.channel import ANY_SERVERS, RetryPolicy, Waiting, call_metadata, call_with_retry, open_channel
from rlhf.failures import from_rpc_error
from rlhf.logs import bound_context, get_logger
from rlhf.reward.v1 import reward_pb2, reward_pb2_grpc
from rlhf.reward_answers import DEFAULT_REQUEST_BYTES, MalformedAnswerError, results_by_id
from rlhf.security.config import ClientSecurity
from trainer.clients.policy import BrokenServerError, FinishReason
from trainer.clients.reward_wire import FINISH_REASONS, turn
from trainer.clients.waits import CallWatch, watched

_log = get_logger(__name__)

REWARD_SERVICE = "rlhf.reward.v1.RewardService"

_DEFAULT_SAMPLES_PER_CALL = 64
_DEFAULT_CALLS = 4
_SAMPLE_OVERHEAD_BYTES = 8
_MALFORMED_ATTEMPTS = 4
_PENDING_JITTER = 0.2
_LONGEST_PENDING_SECONDS = 3600.0


class RewardChangedError(RuntimeError):
    """The reward server's version is not the one that this run began with, so scores would not compare."""


@dataclass(frozen=True)
class Scored:
    """A finite reward, components for reports, and per-token rewards (one per completion token, or empty)."""

    reward: float
    components: Mapping[str, float] = field(default_factory=dict)
    token_rewards: tuple[float, ...] = ()


@dataclass(frozen=True)
class Abstained:
    """The server chose not to judge."""

    reason: str


@dataclass(frozen=True)
class Failed:
    """The sample can never be judged."""

    code: str
    message: str


T = TypeVar("T")
Outcome = Scored | Abstained | Failed


@dataclass(frozen=True)
class RewardSample:
    """One completion to judge; `sample_id` is the idempotency key and holds a hash of the tokens.

    A prompt has one completion here, so every group has one member and whole groups travel together by themselves.
    """

    sample_id: str
    prompt: str
    completion: str
    completion_ids: tuple[int, ...]
    finish_reason: FinishReason
    metadata: Mapping[str, str] = field(default_factory=dict)
    json_keys: frozenset[str] = frozenset()
    messages: Sequence[Mapping[str, object]] = ()
    step: int | None = None
    """The run's, of the batch or the evaluation that it is judged for."""
    request_id: str | None = None
    """For log lines only."""


@dataclass(frozen=True)
class RewardInfo:
    """What GetRewardInfo tells; limits are resolved (never 0)."""

    name: str
    version: str
    max_samples: int
    max_request_bytes: int
    max_concurrent_calls: int
    required_metadata: tuple[str, ...]
    needs_token_ids: bool


@dataclass
class _Job:
    sample: RewardSample
    message: reward_pb2.Sample
    result: asyncio.Future[Outcome]
    trace: tracing.TraceContext | None
    times_pending: int = 0


class RewardClient:
    """Calls on one reward server for one run.

    Raises BrokenServerError when the server keeps answering what the contract forbids, RewardChangedError when its
    version changes, RpcFailure for what is final; everything else is waited out and told to `watch`.
    """

    def __init__(
        self,
        target: str,
        *,
        run_id: str,
        timeout: float = 60.0,
        retry: RetryPolicy | None = None,
        watch: CallWatch | None = None,
        security: ClientSecurity | None = None,
    ) -> None:
        """`timeout` (seconds) bounds each attempt of a call."""
        self.target = target
        self._run_id = run_id
        self._timeout = timeout
        self._retry = retry or RetryPolicy()
        self._watch = watch
        self._channel = open_channel(target, keepalive=ANY_SERVERS, security=security)
        self._stub: Any = reward_pb2_grpc.RewardServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._info: RewardInfo | None = None
        self._queue: deque[_Job] = deque()
        self._calls: dict[asyncio.Task[None], list[_Job]] = {}
        self._later: set[asyncio.TimerHandle] = set()
        self._sending_soon = False
        self._pending = 0
        self._jitter = random.Random()

    @property
    def pending(self) -> int:
        """Samples without a final outcome: in line, in a call, or PENDING."""
        return self._pending

    async def pin(self, version: str | None = None) -> RewardInfo:
        """Ask what the server is, and hold it to `version` (None = what it is now) from here on.

        Raises RewardChangedError when it is another.
        """
        info = await self._ask_info()
        if version is not None and info.version != version:
            raise RewardChangedError(
                f"reward server {self.target}: this run's reward is version {version!r}, the server is now "
                f"{info.version!r} ({info.name}); scores of two versions do not compare. Start the old one again, "
                "or begin a new run"
            )
        self._info = info
        return info

    async def check_pinned(self) -> None:
        """Raise RewardChangedError when the server is no longer what `pin` found."""
        assert self._info is not None, "pin first"
        await self.pin(self._info.version)

    async def score(self, sample: RewardSample) -> Outcome:
        """What finally became of the sample: sent together with others, asked again while PENDING.

        Cancelling it ends a call once nobody waits for any of its samples.
        """
        assert self._info is not None, "pin first"
        message = self._message(sample)
        if message.ByteSize() + self._request_overhead(sample) > self._info.max_request_bytes:
            return Failed(
                "SAMPLE_TOO_LARGE", f"more than the server's {self._info.max_request_bytes} bytes per request"
            )
        job = _Job(sample, message, asyncio.get_running_loop().create_future(), tracing.here())
        job.result.add_done_callback(self._end_idle_calls)
        self._queue.append(job)
        self._send_soon()
        self._pending += 1
        try:
            return await job.result
        finally:
            self._pending -= 1

    async def abandon(self) -> None:
        """Cancel every call and forget the samples; nothing is lost, since asking again gives the same answer."""
        for handle in self._later:
            handle.cancel()
        self._later.clear()
        for job in self._queue:
            job.result.cancel()
        self._queue.clear()
        calls = list(self._calls)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)

    async def close(self) -> None:
        """Abandon what runs and close the channel."""
        await self.abandon()
        await self._channel.close()

    async def _ask_info(self) -> RewardInfo:
        async def attempt() -> reward_pb2.GetRewardInfoResponse:
            try:
                answer: reward_pb2.GetRewardInfoResponse = await self._stub.GetRewardInfo(
                    reward_pb2.GetRewardInfoRequest(),
                    timeout=self._timeout,
                    metadata=call_metadata(run_id=self._run_id),
                )
                return answer
            except grpc.aio.AioRpcError as error:
                raise from_rpc_error(error) from error

        answer = await self._retried(attempt)
        if not answer.version:
            raise BrokenServerError(
                f"reward server {self.target} states no version, so a run can't be held to it: let its "
                "GetRewardInfo answer one"
            )
        if answer.scope not in reward_pb2.Scope.values():
            raise BrokenServerError(
                f"reward server {self.target} scores by scope {answer.scope}, which this trainer does not know: "
                "use a newer trainer, or a reward of SCOPE_SAMPLE or SCOPE_GROUP"
            )
        return RewardInfo(
            name=answer.name,
            version=answer.version,
            max_samples=answer.max_samples or _DEFAULT_SAMPLES_PER_CALL,
            max_request_bytes=answer.max_request_bytes or DEFAULT_REQUEST_BYTES,
            max_concurrent_calls=answer.max_concurrent_calls or _DEFAULT_CALLS,
            required_metadata=tuple(answer.required_metadata),
            needs_token_ids=answer.needs_token_ids,
        )

    def _send_soon(self) -> None:
        """Send once everything that arrives in this turn of the event loop has arrived: it travels together."""
        if not self._sending_soon:
            self._sending_soon = True
            asyncio.get_running_loop().call_soon(self._send_what_fits)

    def _send_what_fits(self) -> None:
        self._sending_soon = False
        assert self._info is not None
        self._queue = deque(job for job in self._queue if not job.result.cancelled())
        while self._queue and len(self._calls) < self._info.max_concurrent_calls:
            batch = self._cut_batch()
            call = asyncio.create_task(self._score_batch(batch))
            self._calls[call] = batch
            call.add_done_callback(self._call_done)

    def _call_done(self, call: asyncio.Task[None]) -> None:
        del self._calls[call]
        self._send_what_fits()

    def _end_idle_calls(self, result: asyncio.Future[Outcome]) -> None:
        if not result.cancelled():
            return
        for call, batch in self._calls.items():
            if all(job.result.cancelled() for job in batch):
                call.cancel()

    def _cut_batch(self) -> list[_Job]:
        """The longest head of the queue within the server's limits and of one kind of metadata."""
        assert self._info is not None
        first = self._queue[0].sample
        batch: list[_Job] = []
        room = self._info.max_request_bytes - self._request_overhead(first) + _SAMPLE_OVERHEAD_BYTES
        while self._queue and len(batch) < self._info.max_samples:
            job = self._queue[0]
            size = job.message.ByteSize() + _SAMPLE_OVERHEAD_BYTES
            if size > room or job.sample.json_keys != first.json_keys:
                break
            room -= size
            batch.append(self._queue.popleft())
        return batch

    async def _score_batch(self, batch: list[_Job]) -> None:
        try:
            with bound_context(step=batch[0].sample.step, request_id=_request_id(batch)), _batch_span(batch):
                results = await self._ask_until_well_formed(batch)
                for job in batch:
                    self._settle(job, results[job.sample.sample_id])
        except Exception as error:
            # Every sample's caller learns why; the first to do so stops the run.
            for job in batch:
                if not job.result.done():
                    job.result.set_exception(error)
            return
        except asyncio.CancelledError:
            for job in batch:
                job.result.cancel()
            raise

    def _settle(self, job: _Job, result: reward_pb2.SampleResult) -> None:
        if job.result.done():
            return
        match result.WhichOneof("outcome"):
            case "scored":
                scored = result.scored
                job.result.set_result(Scored(scored.reward, dict(scored.components), tuple(scored.token_rewards)))
            case "abstained":
                job.result.set_result(Abstained(result.abstained.reason))
            case "failed":
                job.result.set_result(Failed(result.failed.code, result.failed.message))
            case _:
                self._ask_later(job, result.pending)

    def _ask_later(self, job: _Job, pending: reward_pb2.Pending) -> None:
        # Asking earlier than the server says is allowed; a Duration may hold more than any clock.
        delay = min(pending.retry_after.ToNanoseconds() / 1e9, _LONGEST_PENDING_SECONDS)
        if self._watch is not None:
            job.times_pending += 1
            if job.times_pending == 1:
                job.result.add_done_callback(self._watch.over)
            reason = f"the reward of {job.sample.sample_id} is pending"
            self._watch.waiting(job.result, Waiting("reward server", self.target, 0.0, job.times_pending, reason))

        def again() -> None:
            self._later.discard(handle)
            self._queue.append(job)
            self._send_soon()

        delay *= 1 + self._jitter.uniform(0, _PENDING_JITTER)
        handle = asyncio.get_running_loop().call_later(delay, again)
        self._later.add(handle)

    async def _ask_until_well_formed(self, batch: list[_Job]) -> dict[str, reward_pb2.SampleResult]:
        request = reward_pb2.ScoreRequest(
            run_id=self._run_id,
            samples=[job.message for job in batch],
            json_metadata_keys=sorted(batch[0].sample.json_keys),
        )
        metadata = call_metadata(run_id=self._run_id, step=batch[0].sample.step, request_id=_request_id(batch))
        attempts = 0

        async def attempt() -> reward_pb2.ScoreResponse:
            nonlocal attempts
            attempts += 1
            if attempts > 1:
                # A server that went away may have come back as another reward.
                await self.check_pinned()
            try:
                answer: reward_pb2.ScoreResponse = await self._stub.Score(
                    request, timeout=self._timeout, metadata=metadata
                )
                return answer
            except grpc.aio.AioRpcError as error:
                raise from_rpc_error(error) from error

        for malformed in range(1, _MALFORMED_ATTEMPTS + 1):
            answer = await self._retried(attempt)
            try:
                return self._checked(batch, answer)
            except BrokenServerError as error:
                if malformed == _MALFORMED_ATTEMPTS:
                    raise
                _log.warning("a malformed answer is asked for again", error=str(error), attempt=malformed)
                await asyncio.sleep(self._retry.initial * self._retry.multiplier**malformed)
        raise AssertionError("unreachable")

    async def _retried(self, attempt: Callable[[], Awaitable[T]]) -> T:
        with watched(self._watch) as on_wait:
            return await call_with_retry(
                attempt, policy=self._retry, what="reward server", target=self.target, on_wait=on_wait
            )

    def _checked(self, batch: list[_Job], answer: reward_pb2.ScoreResponse) -> dict[str, reward_pb2.SampleResult]:
        """The results by id, or BrokenServerError naming the server and the first sample that is wrong."""
        try:
            return results_by_id(answer, {job.sample.sample_id: len(job.sample.completion_ids) for job in batch})
        except MalformedAnswerError as error:
            raise BrokenServerError(f"reward server {self.target}: {error}") from error

    def _request_overhead(self, sample: RewardSample) -> int:
        keys = sum(len(key.encode()) + _SAMPLE_OVERHEAD_BYTES for key in sample.json_keys)
        return len(self._run_id.encode()) + keys + 2 * _SAMPLE_OVERHEAD_BYTES

    def _message(self, sample: RewardSample) -> reward_pb2.Sample:
        assert self._info is not None
        return reward_pb2.Sample(
            sample_id=sample.sample_id,
            group_id=sample.sample_id,
            group_size=1,
            prompt=sample.prompt,
            completion=sample.completion,
            messages=[turn(message) for message in sample.messages],
            completion_token_ids=sample.completion_ids if self._info.needs_token_ids else (),
            finish_reason=FINISH_REASONS.get(sample.finish_reason, reward_pb2.FINISH_REASON_UNSPECIFIED),
            metadata=dict(sample.metadata),
        )


def _batch_span(batch: Sequence[_Job]) -> tracing.Span:
    """A child of what the first sample was scored for; linked to what else its samples are for."""
    first = batch[0]
    others = {id(job.trace): job.trace for job in batch if job.trace is not first.trace}
    return tracing.span("score", parent=first.trace, links=list(others.values()), samples=len(batch))


def _request_id(batch: Sequence[_Job]) -> str | None:
    """The first sample's, and how many more there are."""
    first = batch[0].sample.request_id
    return first if first is None or len(batch) == 1 else f"{first}+{len(batch) - 1}"
