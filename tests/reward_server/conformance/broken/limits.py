"""Limits, deadlines and cancelled calls."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc

from rlhf.failures import RpcFailure, overloaded
from rlhf.reward.v1 import reward_pb2
from tests.reward_server.conformance.broken.marking import NeedsTiming, caught_by
from tests.reward_server.conformance.right_server import RightServer


@caught_by("limits/largest-request")
class DeclaresMoreBytesThanItTakes(RightServer):
    def describe(self) -> reward_pb2.GetRewardInfoResponse:
        info = super().describe()
        info.max_request_bytes += 512
        return info


@caught_by("limits/larger-request")
class DeclaresFewerBytesThanItTakes(RightServer):
    def describe(self) -> reward_pb2.GetRewardInfoResponse:
        info = super().describe()
        info.max_request_bytes //= 2
        return info


class _TakesAWhile(NeedsTiming):
    """Calls of one sample are open for a while, so that those sent at once meet."""

    async def work(self, request: reward_pb2.ScoreRequest, context: Any) -> None:
        await asyncio.sleep(0.02 if len(request.samples) == 1 else 0.0)


@caught_by("limits/concurrent-calls")
class RefusesAtTheDeclaredConcurrency(_TakesAWhile):
    def admit(self, open_calls: int) -> None:
        if open_calls >= self.max_concurrent_calls:
            self.showed = True
            raise overloaded("too many calls", retry_after=0.01)


@caught_by("limits/overload")
class UnavailableUnderLoad(_TakesAWhile):
    def admit(self, open_calls: int) -> None:
        if open_calls > self.max_concurrent_calls:
            self.showed = True
            raise RpcFailure(grpc.StatusCode.ABORTED, "too many calls")


@caught_by("errors/retry-info")
class OverloadedWithoutRetryInfo(_TakesAWhile):
    def admit(self, open_calls: int) -> None:
        if open_calls > self.max_concurrent_calls:
            self.showed = True
            raise RpcFailure(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many calls", reason="OVERLOADED")


@caught_by("errors/error-info")
class OverloadedForNoReason(_TakesAWhile):
    def admit(self, open_calls: int) -> None:
        if open_calls > self.max_concurrent_calls:
            self.showed = True
            raise RpcFailure(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many calls", retry_after=0.01)


@caught_by("deadline/answered-in-time")
class IgnoresTheDeadline(RightServer):
    async def work(self, request: reward_pb2.ScoreRequest, context: Any) -> None:
        if 0.1 < context.time_remaining() < 3.1:
            await asyncio.sleep(3.2)
        await super().work(request, context)


class _Forgets(NeedsTiming):
    """Waits for ever for a sample of a call that ended early."""

    def __init__(self) -> None:
        super().__init__()
        self._stuck: set[str] = set()

    def affected(self, request: reward_pb2.ScoreRequest, context: Any) -> bool:
        raise NotImplementedError

    async def work(self, request: reward_pb2.ScoreRequest, context: Any) -> None:
        ids = {sample.sample_id for sample in request.samples}
        if ids & self._stuck:
            self.showed = True
            await asyncio.Event().wait()
        if self.affected(request, context):
            self._stuck |= ids
            await asyncio.sleep(0.3)
            self._stuck -= ids


@caught_by("deadline/asked-again")
class HangsAfterAMissedDeadline(_Forgets):
    def affected(self, request: reward_pb2.ScoreRequest, context: Any) -> bool:
        return context.time_remaining() < 0.1


@caught_by("cancel/asked-again")
class HangsAfterACancel(_Forgets):
    def affected(self, request: reward_pb2.ScoreRequest, context: Any) -> bool:
        # Only a large call takes so long that it can be cancelled.
        return len(request.samples) == 32 and not any(
            (request.run_id, each.sample_id) in self._memory for each in request.samples
        )

    max_samples = 40


@caught_by("cancel/keeps-serving")
class LeaksThePlacesOfCancelledCalls(RightServer):
    max_samples = 40
    leaked = 0

    def admit(self, open_calls: int) -> None:
        super().admit(open_calls + self.leaked)

    async def work(self, request: reward_pb2.ScoreRequest, context: Any) -> None:
        try:
            await asyncio.sleep(0.3 if len(request.samples) == 32 else self.hold_seconds)
        except asyncio.CancelledError:
            self.leaked += 1
            raise
