"""Messages of the reward contract: conversations into them, and what may be wrong with a result."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

from rlhf.reward.v1 import reward_pb2
from trainer.clients.policy import FinishReason

_LARGEST_FLOAT32 = 3.4e38

FINISH_REASONS = {
    FinishReason.EOS: reward_pb2.FINISH_REASON_EOS,
    FinishReason.STOP: reward_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: reward_pb2.FINISH_REASON_LENGTH,
}


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
            return "has no outcome that this trainer knows"
    return None


def turn(message: Mapping[str, object]) -> reward_pb2.ChatMessage:
    """One turn of a conversation: content as text or a list of text parts, everything else as JSON."""
    content = message.get("content")
    texts = [content] if isinstance(content, str) else _part_texts(content)
    extra = {key: value for key, value in message.items() if key not in ("role", "content")}
    return reward_pb2.ChatMessage(
        role=str(message["role"]),
        parts=[reward_pb2.ContentPart(text=text) for text in texts],
        extra_json=json.dumps(extra, ensure_ascii=False, default=str) if extra else "",
    )


def _part_texts(content: object) -> list[str]:
    if content is None:
        return []
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        return [part["text"] for part in content]
    raise ValueError(f"a message's content must be text or a list of text parts, not {type(content).__name__}")
