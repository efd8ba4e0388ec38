"""RewardService over the wire."""

from __future__ import annotations

from typing import Any

import grpc

from reward_server.kinds import Description
from reward_server.memory import SampleKey
from reward_server.results import Failed, Outcome
from reward_server.scheduler import Entry, Scheduler
from reward_server.validation import check_score_request
from reward_server.wire import decode, encode, fingerprint
from rlhf import failures
from rlhf.reward.v1 import reward_pb2, reward_pb2_grpc

SERVICE_NAME = "rlhf.reward.v1.RewardService"

_Context = grpc.aio.ServicerContext[Any, Any]


class RewardService(reward_pb2_grpc.RewardServiceServicer):
    """Serves one reward, under its name and as the default.

    max_samples: per call. max_request_bytes: encoded. max_concurrent_calls: what a client is told to keep to; the
    scheduler's bounded queue is what protects the server.
    """

    def __init__(
        self,
        description: Description,
        scheduler: Scheduler,
        *,
        max_samples: int,
        max_request_bytes: int,
        max_concurrent_calls: int,
    ) -> None:
        self._description = description
        self._scheduler = scheduler
        self._max_samples = max_samples
        self._max_request_bytes = max_request_bytes
        self._max_concurrent_calls = max_concurrent_calls

    async def Score(  # noqa: N802 - the contract's name
        self, request: reward_pb2.ScoreRequest, context: _Context
    ) -> reward_pb2.ScoreResponse:
        """Judge every sample of the request; see reward.proto."""
        check_score_request(request, max_samples=self._max_samples)
        self._find(request.reward)
        json_keys = frozenset(request.json_metadata_keys)
        outcomes: dict[str, Outcome] = {}
        entries: list[Entry] = []
        for sample in request.samples:
            decoded = decode(sample, json_keys)
            if isinstance(decoded, Failed):
                outcomes[sample.sample_id] = decoded
            else:
                key = SampleKey(request.run_id, sample.sample_id)
                entries.append(Entry(key, fingerprint(sample, json_keys), decoded))
        judged = await self._scheduler.score(entries, _patience(context))
        for entry, outcome in zip(entries, judged, strict=True):
            outcomes[entry.key.sample_id] = outcome
        return reward_pb2.ScoreResponse(
            results=[encode(sample.sample_id, outcomes[sample.sample_id]) for sample in request.samples]
        )

    async def GetRewardInfo(  # noqa: N802 - the contract's name
        self, request: reward_pb2.GetRewardInfoRequest, context: _Context
    ) -> reward_pb2.GetRewardInfoResponse:
        """What clients must know; constant while the process lives."""
        self._find(request.reward)
        return reward_pb2.GetRewardInfoResponse(
            name=self._description.name,
            version=self._description.version,
            max_samples=self._max_samples,
            max_request_bytes=self._max_request_bytes,
            max_concurrent_calls=self._max_concurrent_calls,
            scope=reward_pb2.SCOPE_SAMPLE,
            required_metadata=self._description.required_metadata,
            needs_token_ids=self._description.needs_token_ids,
        )

    def _find(self, reward: str) -> None:
        if reward not in ("", self._description.name):
            only = self._description.name
            raise failures.not_found("reward", f"reward {reward[:64]!r} (the only one here is {only!r})")


def _patience(context: _Context) -> float | None:
    """Seconds to judge in, so that the answer arrives within the call's deadline; None = the call has none."""
    remaining: float | None = context.time_remaining()
    if remaining is None:
        return None
    return max(0.0, remaining - min(1.0, max(0.05, remaining / 10)))
