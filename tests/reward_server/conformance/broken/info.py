"""Health, reflection and description; and what wears out."""

# ruff: noqa: N802 - the contract's names

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health, health_pb2

from reward_server.conformance.wire import SERVICE
from rlhf.reward.v1 import reward_pb2
from tests.reward_server.conformance.broken.marking import NeedsTiming, caught_by
from tests.reward_server.conformance.right_server import RightServer, Sample


@caught_by("health/service")
class ForgetsHealthForTheService(RightServer):
    serves_health = ("",)


@caught_by("health/alive")
class ForgetsHealthForTheWhole(RightServer):
    serves_health = (SERVICE,)


class _EveryServiceServes(health.aio.HealthServicer):
    async def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> health_pb2.HealthCheckResponse:
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)


class _StatusFromTheFuture(health.aio.HealthServicer):
    async def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> Any:
        new: Any = 17
        return await super().Check(request, context) if request.service else health_pb2.HealthCheckResponse(status=new)


@caught_by("health/alive")
class StatusFromTheFuture(RightServer):
    def make_health(self) -> health.aio.HealthServicer:
        return _StatusFromTheFuture()


@caught_by("health/unknown-service")
class EveryServiceServes(RightServer):
    def make_health(self) -> health.aio.HealthServicer:
        return _EveryServiceServes()


@caught_by("reflection/describes")
class ReflectsNamesOnly(RightServer):
    reflection_pool = DescriptorPool()


@caught_by("reflection/lists")
class NoReflection(RightServer):
    reflects = None


@caught_by("reflection/lists")
class ReflectsOthersOnly(RightServer):
    reflects = ("grpc.health.v1.Health",)


@caught_by("info/answers")
class DescribesNothing(RightServer):
    async def GetRewardInfo(self, request: reward_pb2.GetRewardInfoRequest, context: Any) -> Any:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not implemented!")


@caught_by("info/constant")
class DescriptionChanges(RightServer):
    asked = 0

    def describe(self) -> reward_pb2.GetRewardInfoResponse:
        info = super().describe()
        info.version = f"1.{self.asked}"
        self.asked += 1
        return info


@caught_by("info/version")
class NoVersion(RightServer):
    def describe(self) -> reward_pb2.GetRewardInfoResponse:
        info = super().describe()
        info.version = ""
        return info


@caught_by("info/name")
class NoName(RightServer):
    def describe(self) -> reward_pb2.GetRewardInfoResponse:
        info = super().describe()
        info.name = ""
        return info


@caught_by("info/scope")
class ScopeFromTheFuture(RightServer):
    scope: Any = 7


@caught_by("info/by-name")
class DoesNotKnowItsOwnName(RightServer):
    def _find(self, reward: str) -> None:
        super()._find(f"{reward}?" if reward else "")


@caught_by("closing/first-answers")
class WearsOut(NeedsTiming):
    """Judges otherwise after a call that ended at its deadline, and has forgotten the first ones by then."""

    memory_samples = 40

    async def work(self, request: reward_pb2.ScoreRequest, context: Any) -> None:
        self.showed = self.showed or context.time_remaining() < 0.1
        await super().work(request, context)

    def reward_of(self, sample: Sample, company: Sequence[Sample]) -> float:
        return super().reward_of(sample, company) * (2 if self.showed else 1)
