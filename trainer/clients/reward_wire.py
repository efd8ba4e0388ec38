"""Messages of the reward contract: what the trainer puts into them."""

from __future__ import annotations

import json
from collections.abc import Mapping

from rlhf.reward.v1 import reward_pb2
from trainer.clients.policy import FinishReason

FINISH_REASONS = {
    FinishReason.EOS: reward_pb2.FINISH_REASON_EOS,
    FinishReason.STOP: reward_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: reward_pb2.FINISH_REASON_LENGTH,
}


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
