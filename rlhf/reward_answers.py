"""What a client of the reward contract checks before it believes an answer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

from rlhf.reward.v1 import reward_pb2

DEFAULT_REQUEST_BYTES = 4 * 2**20
"""Largest request for a server that states no max_request_bytes."""

_LARGEST_FLOAT32 = 3.4e38


class MalformedAnswerError(Exception):
    """A ScoreResponse that the contract forbids; the message names the first sample that is wrong."""


def results_by_id(answer: reward_pb2.ScoreResponse, tokens: Mapping[str, int]) -> dict[str, reward_pb2.SampleResult]:
    """The results of a call by sample id; raises MalformedAnswerError unless all of them can be used.

    tokens: for each sample of the call, how many completion tokens it has.
    """
    times = Counter(result.sample_id for result in answer.results)
    for sample_id, count in times.items():
        if sample_id not in tokens:
            raise _malformed(sample_id, "was not asked for")
        if count > 1:
            raise _malformed(sample_id, f"is answered {count} times")
    for sample_id in tokens:
        if sample_id not in times:
            raise _malformed(sample_id, "is not answered")
    for result in answer.results:
        if wrong := problem(result, tokens=tokens[result.sample_id]):
            raise _malformed(result.sample_id, wrong)
    return {result.sample_id: result for result in answer.results}


def problem(result: reward_pb2.SampleResult, *, tokens: int) -> str | None:
    """What is wrong with one result for a completion of `tokens` tokens; None = nothing."""
    match result.WhichOneof("outcome"):
        case "scored":
            scored = result.scored
            if not scored.HasField("reward"):
                return "is scored without a reward"
            if not math.isfinite(scored.reward):
                return f"has the reward {scored.reward}, which is not finite"
            if abs(scored.reward) > _LARGEST_FLOAT32:
                return f"has the reward {scored.reward}, which is too large to train with"
            if not all(math.isfinite(value) for value in scored.components.values()):
                return "has a component that is not finite"
            if scored.token_rewards and len(scored.token_rewards) != tokens:
                return f"has {len(scored.token_rewards)} token rewards for {tokens} tokens"
            if not all(math.isfinite(value) for value in scored.token_rewards):
                return "has a token reward that is not finite"
        case "pending":
            if not result.pending.HasField("retry_after") or result.pending.retry_after.ToNanoseconds() <= 0:
                return "is pending without a retry_after above 0"
        case None:
            return "has no outcome that is known here"
    return None


def _malformed(sample_id: str, what: str) -> MalformedAnswerError:
    return MalformedAnswerError(f"sample {sample_id!r} {what}")
