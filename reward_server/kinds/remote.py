"""The remote kind: another reward server, in any language, whose answers are passed on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Self

import grpc
from pydantic import Field, model_validator

from reward_server.kinds import Description, Limits, RewardKind, RewardLoadError, Sample, Scope
from reward_server.kinds.peer import Peer, PeerOptions
from reward_server.memory import SampleKey
from reward_server.results import Abstained, Failed, FailureCode, Outcome, Pending, Scored
from rlhf import __version__
from rlhf.channel import (
    ANY_SERVERS,
    DEFAULT_MAX_MESSAGE_BYTES,
    RetryPolicy,
    call_metadata,
    call_with_retry,
    open_channel,
)
from rlhf.failures import RpcFailure, from_rpc_error, internal, is_transient
from rlhf.reward.v1 import reward_pb2, reward_pb2_grpc
from rlhf.reward_answers import DEFAULT_REQUEST_BYTES, results_by_id
from rlhf.security.config import ClientSecurity, ClientTls, CredentialsError

_INFO_SECONDS = 10.0
# Tag and length, at most.
_FIELD_BYTES = 8
_LONGEST_PENDING_SECONDS = 3600.0
_AT_START = RetryPolicy(maximum=2.0)

_SCOPES = {
    reward_pb2.SCOPE_UNSPECIFIED: Scope.SAMPLE,
    reward_pb2.SCOPE_SAMPLE: Scope.SAMPLE,
    reward_pb2.SCOPE_GROUP: Scope.GROUP,
}


class RemoteOptions(PeerOptions):
    """Another reward server."""

    target: str = Field(min_length=1, description="Its address: host:port, or any name that gRPC resolves")
    reward: str = Field(default="", description="Which of its rewards; empty = its default")
    start_timeout: float = Field(
        default=600.0, gt=0, description="How long the start waits for it, loading included [seconds]"
    )
    tls: bool = Field(default=False, description="Reach it over TLS; every file below is read again when it changes")
    tls_ca: Path | None = Field(
        default=None, description="Authorities that its certificate may be of (PEM); unset = the public ones"
    )
    tls_cert: Path | None = Field(default=None, description="Certificate of this process, if it asks for one (PEM)")
    tls_key: Path | None = Field(default=None, description="Its key (PEM, not encrypted)")
    tls_name: str = Field(default="", description="Name in its certificate; empty = that of the target")
    token_file: Path | None = Field(default=None, description="File with the token that it wants")

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together")
        if not self.tls and (self.tls_ca is not None or self.tls_cert is not None or self.tls_name):
            raise ValueError("tls_ca, tls_cert and tls_name are of no use without tls: true")
        return self

    def security(self) -> ClientSecurity:
        """How it is reached."""
        tls = ClientTls(self.tls_ca, self.tls_cert, self.tls_key, self.tls_name) if self.tls else None
        return ClientSecurity(tls, self.token_file)


class RemoteReward(RewardKind):
    """Passes samples on as they came, within the other server's limits, and its outcomes back."""

    kind = "remote"

    def __init__(self, options: RemoteOptions, limits: Limits) -> None:
        self._options = options
        self._name = f"reward server {options.target}"
        self._peer = Peer(self.kind, "reward server", options.target, options)
        self.batch_size = limits.batch_size
        self.concurrency = limits.concurrency
        self._calls = asyncio.Semaphore(limits.concurrency)
        self._channel: grpc.aio.Channel | None = None
        self._may_have_changed = False

    async def start(self) -> None:
        """Wait for the other server and take over what it says of itself."""
        try:
            self._channel = open_channel(self._options.target, keepalive=ANY_SERVERS, security=self._options.security())
        except CredentialsError as error:
            raise RewardLoadError(f"{self._name}: {error}") from error
        self._stub: Any = reward_pb2_grpc.RewardServiceStub(self._channel)  # type: ignore[no-untyped-call]
        try:
            async with asyncio.timeout(self._options.start_timeout):
                self._info = await call_with_retry(
                    self._ask_info, policy=_AT_START, what="reward server", target=self._options.target
                )
        except TimeoutError:
            raise RewardLoadError(
                f"{self._name} was not ready within {self._options.start_timeout:g} seconds"
                " (does it wait for this one in turn?)"
            ) from None
        except RpcFailure as failure:
            raise RewardLoadError(failure.message) from failure
        self.description = self._described(self._info)
        self.batch_size = min(self.batch_size, self._info.max_samples or self.batch_size)
        self.concurrency = min(self.concurrency, self._info.max_concurrent_calls or self.concurrency)
        self._calls = asyncio.Semaphore(self.concurrency)

    async def close(self) -> None:
        """Close the connection."""
        if self._channel is not None:
            await self._channel.close()

    async def score(self, samples: Sequence[Sample], answer_by: float | None) -> list[Outcome]:
        """What the other server answers; what it cannot answer in time is Pending."""
        until = self._peer.deadline(answer_by)
        outcomes: dict[SampleKey, Outcome] = {}
        calls = list(self._cut(samples, outcomes))
        answers = await asyncio.gather(*(self._score(call, until) for call in calls), return_exceptions=True)
        for call, answer in zip(calls, answers, strict=True):
            if isinstance(answer, BaseException):
                raise answer
            outcomes.update(zip((sample.key for sample in call), answer, strict=True))
        return [outcomes[sample.key] for sample in samples]

    def _cut(self, samples: Sequence[Sample], refused: dict[SampleKey, Outcome]) -> Iterator[list[Sample]]:
        """The samples of each call, within the other server's limits; what never fits them is put into `refused`."""
        most_samples = self._info.max_samples or len(samples)
        most_bytes = min(self._info.max_request_bytes or DEFAULT_REQUEST_BYTES, DEFAULT_MAX_MESSAGE_BYTES)
        for (run_id, json_keys), alike in _grouped(
            samples, lambda sample: (sample.key.run_id, sorted(sample.json_keys))
        ):
            call: list[Sample] = []
            empty = size = _bytes(self._options.reward, run_id, *json_keys)
            for _, unit in _grouped(alike, self._together):
                more = sum(sample.message.ByteSize() + _FIELD_BYTES for sample in unit)
                if len(unit) > most_samples or empty + more > most_bytes:
                    why = f"{len(unit)} samples of {more} bytes; {self._name} takes {most_samples} of {most_bytes}"
                    refused.update((sample.key, Failed(FailureCode.SAMPLE_TOO_LARGE, why)) for sample in unit)
                    continue
                if len(call) + len(unit) > most_samples or size + more > most_bytes:
                    yield call
                    call, size = [], empty
                call += unit
                size += more
            if call:
                yield call

    def _together(self, sample: Sample) -> str:
        return sample.group_id if self.description.scope is Scope.GROUP else sample.key.sample_id

    async def _score(self, samples: Sequence[Sample], until: float) -> list[Outcome]:
        """One call, made again while the server is away or its answer is malformed."""
        request = reward_pb2.ScoreRequest(
            reward=self._options.reward,
            run_id=samples[0].key.run_id,
            samples=[sample.message for sample in samples],
            json_metadata_keys=sorted(samples[0].json_keys),
        )
        tokens = {sample.message.sample_id: len(sample.message.completion_token_ids) for sample in samples}
        async with self._calls:
            answer = await self._peer.ask_and_read(
                lambda: self._ask(request, until), lambda response: results_by_id(response, tokens), until=until
            )
        if isinstance(answer, Pending):
            return [answer] * len(samples)
        return [_outcome(answer[sample.message.sample_id]) for sample in samples]

    async def _ask(self, request: reward_pb2.ScoreRequest, until: float) -> reward_pb2.ScoreResponse:
        await self._check_unchanged(until)
        try:
            answer: reward_pb2.ScoreResponse = await self._stub.Score(
                request, timeout=_seconds_until(until), metadata=call_metadata(run_id=request.run_id)
            )
        except grpc.aio.AioRpcError as error:
            self._may_have_changed = True
            raise self._failure(error) from error
        return answer

    async def _check_unchanged(self, until: float) -> None:
        """Ask again what the server is, if it may be another process than the one that was asked last."""
        assert self._channel is not None
        connected = self._channel.get_state() is grpc.ChannelConnectivity.READY
        if connected and not self._may_have_changed:
            return
        self._may_have_changed = True
        info = await self._ask_info(min(_INFO_SECONDS, _seconds_until(until)))
        if info.version != self._info.version:
            raise internal(
                f"{self._name} was version {self._info.version!r} when this server started and is {info.version!r} now;"
                " scores of two versions do not compare. Start this server again, or the old version of that one"
            )
        self._info = info
        self._may_have_changed = False

    async def _ask_info(self, seconds: float = _INFO_SECONDS) -> reward_pb2.GetRewardInfoResponse:
        request = reward_pb2.GetRewardInfoRequest(reward=self._options.reward)
        try:
            info: reward_pb2.GetRewardInfoResponse = await self._stub.GetRewardInfo(request, timeout=seconds)
        except grpc.aio.AioRpcError as error:
            raise self._failure(error) from error
        if not info.version:
            raise internal(f"{self._name} states no version, so nobody could tell when its scores change")
        if info.scope not in _SCOPES:
            raise internal(f"{self._name} scores by scope {info.scope}, which is not known here")
        return info

    def _failure(self, error: grpc.aio.AioRpcError) -> RpcFailure:
        """What failed; our own caller made no mistake, whatever the code of a final failure says."""
        failure = from_rpc_error(error)
        return failure if is_transient(failure) else internal(f"{self._name} answers {failure}")

    def _described(self, info: reward_pb2.GetRewardInfoResponse) -> Description:
        # Not the target: the same reward may move.
        return Description(
            name=info.name or self._options.target,
            version=f"{info.version}+remote-{__version__}",
            required_metadata=tuple(info.required_metadata),
            needs_token_ids=info.needs_token_ids,
            scope=_SCOPES[info.scope],
            remembers=info.remembers.ToNanoseconds() / 1e9 if info.HasField("remembers") else None,
        )


def _grouped(samples: Iterable[Sample], key: Callable[[Sample], Any]) -> Iterator[tuple[Any, list[Sample]]]:
    for value, alike in groupby(sorted(samples, key=key), key=key):
        yield value, list(alike)


def _bytes(*texts: str) -> int:
    """What a request with these texts takes, rounded up."""
    return sum(len(text.encode()) + _FIELD_BYTES for text in texts)


def _seconds_until(until: float) -> float:
    return max(0.001, until - time.monotonic())


def _outcome(result: reward_pb2.SampleResult) -> Outcome:
    match result.WhichOneof("outcome"):
        case "scored":
            scored = result.scored
            return Scored(scored.reward, dict(scored.components), tuple(scored.token_rewards))
        case "abstained":
            return Abstained(result.abstained.reason)
        case "failed":
            return Failed(result.failed.code, result.failed.message)
        case _:
            return Pending(min(result.pending.retry_after.ToNanoseconds() / 1e9, _LONGEST_PENDING_SECONDS))
