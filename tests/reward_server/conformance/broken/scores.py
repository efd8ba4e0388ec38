"""Answers, and what they depend on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc

from reward_server.conformance.wire import SERVICE
from rlhf.failures import invalid_argument
from rlhf.reward.v1 import reward_pb2
from tests.reward_server.conformance.broken.marking import NeverLate, caught_by, renamed
from tests.reward_server.conformance.right_server import RightServer, Sample, SampleResult


@caught_by("score/ordinary-batch")
class HasAFaultOfItsOwn(RightServer):
    async def work(self, request: reward_pb2.ScoreRequest, context: Any) -> None:
        await context.abort(grpc.StatusCode.INTERNAL, "the judge is broken")


@caught_by("score/ordinary-batch")
class AnswersWithOtherBytes(RightServer):
    def add_to(self, server: grpc.aio.Server) -> None:
        methods = {
            "Score": grpc.unary_unary_rpc_method_handler(
                self.Score, reward_pb2.ScoreRequest.FromString, lambda response: b"\xff" + response.SerializeToString()
            ),
            "GetRewardInfo": grpc.unary_unary_rpc_method_handler(
                self.GetRewardInfo,
                reward_pb2.GetRewardInfoRequest.FromString,
                reward_pb2.GetRewardInfoResponse.SerializeToString,
            ),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))


@caught_by("score/single-sample")
class NeedsTwoSamples(RightServer):
    async def work(self, request: reward_pb2.ScoreRequest, context: Any) -> None:
        if len(request.samples) == 1:
            await context.abort(grpc.StatusCode.INTERNAL, "no variance")
        await super().work(request, context)


@caught_by("score/every-sample-answered-once")
class DropsOneId(RightServer):
    def finish(self, request: reward_pb2.ScoreRequest, results: list[SampleResult]) -> list[SampleResult]:
        return results[:-1] if len(results) > 2 else results


@caught_by("score/every-sample-answered-once")
class DoublesOneId(RightServer):
    def finish(self, request: reward_pb2.ScoreRequest, results: list[SampleResult]) -> list[SampleResult]:
        return [*results, results[0]]


@caught_by("score/every-sample-answered-once")
class InventsOneId(RightServer):
    def finish(self, request: reward_pb2.ScoreRequest, results: list[SampleResult]) -> list[SampleResult]:
        return [*results, SampleResult(sample_id="invented", scored=reward_pb2.Scored(reward=1.0))]


@caught_by("score/split-merge-reorder")
class SwapsRewards(NeverLate):
    def finish(self, request: reward_pb2.ScoreRequest, results: list[SampleResult]) -> list[SampleResult]:
        scored = [renamed(result, result.sample_id) for result in results if result.HasField("scored")]
        rewards = [result.scored.reward for result in scored]
        for result, reward in zip(scored, rewards[1:] + rewards[:1], strict=True):
            result.scored.reward = reward
        return [*scored, *(result for result in results if not result.HasField("scored"))]


@caught_by("score/split-merge-reorder")
class LooksAtTheWholeBatch(NeverLate):
    def look_up(self, request: reward_pb2.ScoreRequest, sample: Sample) -> SampleResult:
        self._batch = len(request.samples)
        return super().look_up(request, sample)

    def reward_of(self, sample: Sample, company: Sequence[Sample]) -> float:
        return super().reward_of(sample, company) + self._batch


@caught_by("score/one-bad-sample")
class FailsAllForOne(RightServer):
    def finish(self, request: reward_pb2.ScoreRequest, results: list[SampleResult]) -> list[SampleResult]:
        bad = next((each.failed for each in results if each.failed.code == "UNKNOWN_CONTENT"), None)
        return [SampleResult(sample_id=each.sample_id, failed=bad) for each in results] if bad else results


@caught_by("score/log-metadata")
class ScoresByStep(RightServer):
    async def work(self, request: reward_pb2.ScoreRequest, context: Any) -> None:
        self._step = dict(context.invocation_metadata()).get("x-rlhf-step", "0")
        await super().work(request, context)

    def reward_of(self, sample: Sample, company: Sequence[Sample]) -> float:
        return super().reward_of(sample, company) + float(self._step)


@caught_by("score/too-many-samples")
class TakesTooMany(RightServer):
    def check_ids(self, request: reward_pb2.ScoreRequest) -> None:
        if len(request.samples) <= self.max_samples:
            super().check_ids(request)


@caught_by("score/largest-batch")
class TakesOneTooFew(RightServer):
    def check_ids(self, request: reward_pb2.ScoreRequest) -> None:
        super().check_ids(request)
        if len(request.samples) == self.max_samples:
            raise invalid_argument("samples", "too many")

    max_samples = 64  # more than any other case sends
