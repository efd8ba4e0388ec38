"""RewardService over the wire."""

from __future__ import annotations

import time
from typing import Any

import grpc

from reward_server.kinds import Description, Sample, Scope
from reward_server.kinds.groups import fail_whole_groups
from reward_server.results import Failed, Outcome
from reward_server.scheduler import Scheduler
from reward_server.validation import check_score_request
from reward_server.wire import decode, encode
from rlhf import failures, tracing
from rlhf.reward.v1 import reward_pb2, reward_pb2_grpc
from rlhf.security.caller import spending

SERVICE_NAME = "rlhf.reward.v1.RewardService"

_Context = grpc.aio.ServicerContext[Any, Any]


class RewardService(reward_pb2_grpc.RewardServiceServicer):
    """Serves one reward, under its name and as the default; before `open`, calls are UNAVAILABLE.

    max_samples: per call. max_request_bytes: encoded. max_concurrent_calls: what a client is told to keep to; the
    scheduler's bounded queue is what protects the server.
    """

    def __init__(self, *, max_samples: int, max_request_bytes: int, max_concurrent_calls: int) -> None:
        self._served: tuple[Description, Scheduler] | None = None
        self._max_samples = max_samples
        self._max_request_bytes = max_request_bytes
        self._max_concurrent_calls = max_concurrent_calls

    def open(self, description: Description, scheduler: Scheduler) -> None:
        """The reward has started: judge from now on."""
        self._served = (description, scheduler)

    async def Score(  # noqa: N802 - the contract's name
        self, request: reward_pb2.ScoreRequest, context: _Context
    ) -> reward_pb2.ScoreResponse:
        """Judge every sample of the request; see reward.proto."""
        tracing.annotate(samples=len(request.samples))
        description, scheduler = self._find(request.reward)
        check_score_request(request, max_samples=self._max_samples, scope=description.scope)
        json_keys = frozenset(request.json_metadata_keys)
        decoded = [decode(request.run_id, sample, json_keys) for sample in request.samples]
        outcomes: list[Outcome | None] = [each if isinstance(each, Failed) else None for each in decoded]
        if description.scope is Scope.GROUP:
            outcomes = fail_whole_groups([sample.group_id for sample in request.samples], outcomes)
        samples = [
            each
            for each, outcome in zip(decoded, outcomes, strict=True)
            if outcome is None and isinstance(each, Sample)
        ]
        with spending(len(samples)) as spent:
            judged = iter(await scheduler.score(samples, _answer_by(context)))
            spent.used = len(samples)
        response = reward_pb2.ScoreResponse()
        for sample, outcome in zip(request.samples, outcomes, strict=True):
            result = response.results.add()
            result.sample_id = sample.sample_id
            encode(next(judged) if outcome is None else outcome, result)
        return response

    async def GetRewardInfo(  # noqa: N802 - the contract's name
        self, request: reward_pb2.GetRewardInfoRequest, context: _Context
    ) -> reward_pb2.GetRewardInfoResponse:
        """What clients must know; constant while the process lives."""
        description, _ = self._find(request.reward)
        answer = reward_pb2.GetRewardInfoResponse(
            name=description.name,
            version=description.version,
            max_samples=self._max_samples,
            max_request_bytes=self._max_request_bytes,
            max_concurrent_calls=self._max_concurrent_calls,
            scope=reward_pb2.SCOPE_GROUP if description.scope is Scope.GROUP else reward_pb2.SCOPE_SAMPLE,
            required_metadata=description.required_metadata,
            needs_token_ids=description.needs_token_ids,
        )
        if description.remembers is not None:
            answer.remembers.FromNanoseconds(round(description.remembers * 1e9))
        return answer

    def _find(self, reward: str) -> tuple[Description, Scheduler]:
        if self._served is None:
            raise failures.unavailable("the reward is not ready yet")
        only = self._served[0].name
        if reward not in ("", only):
            raise failures.not_found("reward", f"reward {reward[:64]!r} (the only one here is {only!r})")
        return self._served


def _answer_by(context: _Context) -> float | None:
    """The time.monotonic() to answer by, so that the answer arrives within the call's deadline; None = it has none."""
    remaining: float | None = context.time_remaining()
    if remaining is None:
        return None
    return time.monotonic() + max(0.0, remaining - min(1.0, max(0.05, remaining / 10)))
