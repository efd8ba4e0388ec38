"""RewardService: between the wire and the reward."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import islice
from typing import Any, NoReturn

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from rlhf.reward.v1 import reward_pb2, reward_pb2_grpc

from memory import Memory, Remembered
from request import MAX_SAMPLES, Violation, violations
from reward import NAME, REQUIRED_COLUMN, VERSION, reward_of
from sample import Unjudgeable, check, fingerprint, reference_answer

SERVICE_NAME = "rlhf.reward.v1.RewardService"
MAX_REQUEST_BYTES = 4 << 20
_MAX_CONCURRENT_CALLS = 64
# Enough to see the pattern: a status above about 8 KB would not reach the client.
_MAX_VIOLATIONS = 8

_Context = grpc.aio.ServicerContext[Any, Any]


class RewardService(reward_pb2_grpc.RewardServiceServicer):
    """Serves the one reward, under its name and as the default."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory

    async def Score(self, request: reward_pb2.ScoreRequest, context: _Context) -> reward_pb2.ScoreResponse:
        """Judge every sample of the request."""
        wrong = list(islice(violations(request), _MAX_VIOLATIONS))
        if wrong:
            await _refuse(context, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", wrong)
        await _find(request.reward, context)
        json_keys = frozenset(request.json_metadata_keys)
        response = reward_pb2.ScoreResponse()
        for sample in request.samples:
            response.results.append(self._answer(request.run_id, sample, json_keys))
            # Lets other calls in; and where the caller has gone or its deadline has passed, gRPC cancels us here.
            await asyncio.sleep(0)
        return response

    async def GetRewardInfo(
        self, request: reward_pb2.GetRewardInfoRequest, context: _Context
    ) -> reward_pb2.GetRewardInfoResponse:
        """Describe the reward; must never change while the process lives."""
        await _find(request.reward, context)
        return reward_pb2.GetRewardInfoResponse(
            name=NAME,
            version=VERSION,
            max_samples=MAX_SAMPLES,
            max_request_bytes=MAX_REQUEST_BYTES,
            max_concurrent_calls=_MAX_CONCURRENT_CALLS,
            scope=reward_pb2.SCOPE_SAMPLE,
            required_metadata=[REQUIRED_COLUMN],
        )

    def _answer(self, run_id: str, sample: reward_pb2.Sample, json_keys: frozenset[str]) -> reward_pb2.SampleResult:
        """The first answer again where the sample is remembered, a new one otherwise."""
        content = fingerprint(sample, json_keys)
        known = self._memory.recall(run_id, sample.sample_id)
        if known is None:
            judged = Remembered(content, judge(sample, json_keys))
            known = self._memory.remember(run_id, sample.sample_id, judged)
        if known.fingerprint != content:
            return _failed(sample, "SAMPLE_ID_CLASH", "this sample_id came with other content before")
        return known.result


def judge(sample: reward_pb2.Sample, json_keys: frozenset[str]) -> reward_pb2.SampleResult:
    """What becomes of a sample that is not remembered."""
    try:
        check(sample, json_keys)
        reward = reward_of(sample.completion, reference_answer(sample, REQUIRED_COLUMN, json_keys))
    except Unjudgeable as reason:
        return _failed(sample, reason.code, str(reason))
    components = {"match": reward.match, "format": reward.format, "length": reward.length}
    scored = reward_pb2.Scored(reward=reward.value, components=components)
    return reward_pb2.SampleResult(sample_id=sample.sample_id, scored=scored)


def _failed(sample: reward_pb2.Sample, code: str, message: str) -> reward_pb2.SampleResult:
    return reward_pb2.SampleResult(sample_id=sample.sample_id, failed=reward_pb2.Failed(code=code, message=message))


async def _find(reward: str, context: _Context) -> None:
    if reward not in ("", NAME):
        wrong = Violation("reward", f"{reward[:64]!r} is not here; the only one is {NAME!r}")
        await _refuse(context, grpc.StatusCode.NOT_FOUND, "NOT_FOUND", [wrong])


async def _refuse(context: _Context, code: grpc.StatusCode, reason: str, wrong: Sequence[Violation]) -> NoReturn:
    """End the call with a status and its google.rpc details, which travel as one binary trailer."""
    message = "; ".join(f"{field}: {description}" for field, description in wrong)
    info = error_details_pb2.ErrorInfo(domain="rlhf-services", reason=reason)
    bad_request = error_details_pb2.BadRequest()
    for field, description in wrong:
        bad_request.field_violations.add(field=field, description=description)
    status = status_pb2.Status(code=code.value[0], message=message)
    for detail in (info, bad_request):
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    await context.abort(code, message, (("grpc-status-details-bin", status.SerializeToString()),))
    raise AssertionError("abort raises")
