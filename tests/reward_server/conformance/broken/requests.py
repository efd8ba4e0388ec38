"""Mistakes of the caller, and the statuses for them."""

# ruff: noqa: N802 - the contract's names

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from reward_server.conformance.wire import SERVICE
from rlhf.failures import RpcFailure, invalid_argument
from rlhf.reward.v1 import reward_pb2
from tests.reward_server.conformance.broken.marking import caught_by
from tests.reward_server.conformance.right_server import RightServer, Sample


@caught_by("request/no-group-id")
class AnswersErrorsInBand(RightServer):
    def check_sample(self, path: str, sample: Sample) -> None:
        if sample.group_id:
            super().check_sample(path, sample)

    def failure_of(self, sample: Sample, json_keys: Sequence[str]) -> str | None:
        return super().failure_of(sample, json_keys) if sample.group_id else "INVALID_ARGUMENT"


class _Ignores(RightServer):
    """Lets some mistakes pass."""

    def check(self, request: reward_pb2.ScoreRequest) -> None:
        try:
            super().check(request)
        except RpcFailure as failure:
            if not self.ignores(request, failure):
                raise

    def ignores(self, request: reward_pb2.ScoreRequest, failure: RpcFailure) -> bool:
        raise NotImplementedError


@caught_by("request/no-run-id")
class NeedsNoRun(_Ignores):
    def ignores(self, request: reward_pb2.ScoreRequest, failure: RpcFailure) -> bool:
        return not request.run_id


@caught_by("request/long-run-id")
class TakesLongRunIds(_Ignores):
    def ignores(self, request: reward_pb2.ScoreRequest, failure: RpcFailure) -> bool:
        return len(request.run_id.encode()) > 256


@caught_by("request/no-samples")
class AnswersNothingToNothing(_Ignores):
    def ignores(self, request: reward_pb2.ScoreRequest, failure: RpcFailure) -> bool:
        return not request.samples


@caught_by("request/same-sample-id")
class TakesAnIdTwice(_Ignores):
    def ignores(self, request: reward_pb2.ScoreRequest, failure: RpcFailure) -> bool:
        return len({sample.sample_id for sample in request.samples}) < len(request.samples)


@caught_by("request/no-sample-id")
class NeedsNoSampleId(_Ignores):
    def ignores(self, request: reward_pb2.ScoreRequest, failure: RpcFailure) -> bool:
        return any(not sample.sample_id for sample in request.samples)


@caught_by("request/long-sample-id")
class CountsCharactersOfIds(_Ignores):
    def ignores(self, request: reward_pb2.ScoreRequest, failure: RpcFailure) -> bool:
        return any(len(sample.sample_id) <= 256 < len(sample.sample_id.encode()) for sample in request.samples)


@caught_by("request/overlapping-ranges")
class TakesOverlappingRanges(_Ignores):
    def ignores(self, request: reward_pb2.ScoreRequest, failure: RpcFailure) -> bool:
        ranges = _ranges(request)
        return len(ranges) == 2 and ranges[0].first < ranges[1].first < ranges[0].past_last


@caught_by("request/descending-ranges")
class TakesDescendingRanges(_Ignores):
    def ignores(self, request: reward_pb2.ScoreRequest, failure: RpcFailure) -> bool:
        ranges = _ranges(request)
        return len(ranges) == 2 and ranges[1].past_last <= ranges[0].first


@caught_by("request/empty-range")
class TakesEmptyRanges(_Ignores):
    def ignores(self, request: reward_pb2.ScoreRequest, failure: RpcFailure) -> bool:
        return any(each.first == each.past_last for each in _ranges(request))


@caught_by("request/range-beyond")
class CutsRanges(_Ignores):
    def ignores(self, request: reward_pb2.ScoreRequest, failure: RpcFailure) -> bool:
        return any(each.past_last > 4 for each in _ranges(request))


@caught_by("request/range-without-tokens")
class TakesRangesOfNothing(_Ignores):
    def ignores(self, request: reward_pb2.ScoreRequest, failure: RpcFailure) -> bool:
        return bool(_ranges(request)) and not request.samples[0].completion_token_ids


@caught_by("request/longest-ids")
class TakesShorterIdsOnly(RightServer):
    def check_ids(self, request: reward_pb2.ScoreRequest) -> None:
        super().check_ids(request)
        if len(request.run_id) > 255:
            raise invalid_argument("run_id", "too long")


@caught_by("request/malformed")
class TakesAnyBytes(RightServer):
    def add_to(self, server: grpc.aio.Server) -> None:
        score = grpc.unary_unary_rpc_method_handler(self.Score, _lenient, reward_pb2.ScoreResponse.SerializeToString)
        describe = grpc.unary_unary_rpc_method_handler(
            self.GetRewardInfo,
            reward_pb2.GetRewardInfoRequest.FromString,
            reward_pb2.GetRewardInfoResponse.SerializeToString,
        )
        methods = {"Score": score, "GetRewardInfo": describe}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))

    async def Score(self, request: reward_pb2.ScoreRequest | None, context: Any) -> Any:
        return reward_pb2.ScoreResponse() if request is None else await super().Score(request, context)


@caught_by("score/unknown-reward")
class OneRewardForEveryName(RightServer):
    async def Score(self, request: reward_pb2.ScoreRequest, context: Any) -> Any:
        request.reward = ""
        return await super().Score(request, context)


@caught_by("info/unknown-reward")
class OneDescriptionForEveryName(RightServer):
    async def GetRewardInfo(self, request: reward_pb2.GetRewardInfoRequest, context: Any) -> Any:
        return self.describe()


@caught_by("errors/field-paths")
class WrongFieldPath(RightServer):
    async def refuse(self, failure: RpcFailure, context: Any) -> None:
        if failure.violations and failure.violations[0].field.endswith(".group_id"):
            failure = invalid_argument("samples.group_id", "required")
        await super().refuse(failure, context)


@caught_by("errors/error-info")
class MissingErrorInfo(RightServer):
    async def refuse(self, failure: RpcFailure, context: Any) -> None:
        failure.reason = ""
        await super().refuse(failure, context)


def _lenient(data: bytes) -> reward_pb2.ScoreRequest | None:
    try:
        return reward_pb2.ScoreRequest.FromString(data)
    except DecodeError:
        return None


def _ranges(request: reward_pb2.ScoreRequest) -> Sequence[reward_pb2.TokenRange]:
    return request.samples[0].sampled_ranges if request.samples else ()
