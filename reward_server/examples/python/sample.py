"""What a sample says, as far as the reward needs it, and why some can't be judged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Set
from typing import Any

from rlhf.reward.v1 import reward_pb2


class Unjudgeable(Exception):
    """The sample can never be judged; becomes its FAILED outcome."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def check(sample: reward_pb2.Sample, json_keys: Set[str]) -> None:
    """Raises Unjudgeable for a fault that has nothing to do with which reward it is."""
    for key, text in sample.metadata.items():
        if key in json_keys:
            # A failure's message may have 1 KiB, a key megabytes.
            _json(text, f"metadata[{key[:64]!r}]")
    for index, message in enumerate(sample.messages):
        path = f"messages[{index}]"
        if any(part.WhichOneof("kind") is None for part in message.parts):
            raise Unjudgeable("UNKNOWN_CONTENT", f"{path} has a part of a kind that this server does not know")
        if message.extra_json and not isinstance(_json(message.extra_json, f"{path}.extra_json"), dict):
            raise Unjudgeable("INVALID_METADATA", f"{path}.extra_json is not a JSON object")


def reference_answer(sample: reward_pb2.Sample, column: str, json_keys: Set[str]) -> str:
    """The text that `column` stands for. Raises Unjudgeable where the row has no value."""
    text = sample.metadata.get(column)
    value = _json(text, f"metadata[{column!r}]") if text is not None and column in json_keys else text
    if text is None or value is None:
        raise Unjudgeable("MISSING_METADATA", f"the reward needs the column {column!r}")
    return value if isinstance(value, str) else text


def fingerprint(sample: reward_pb2.Sample, json_keys: Set[str]) -> bytes:
    """A digest of all that may change a score: the sample without its group, and which of its columns are JSON."""
    content = reward_pb2.Sample()
    content.CopyFrom(sample)
    content.ClearField("group_id")
    content.ClearField("group_size")
    # One message for both, so that no two different contents make the same bytes.
    relevant = reward_pb2.ScoreRequest(samples=[content], json_metadata_keys=sorted(json_keys & sample.metadata.keys()))
    # Maps have no order; deterministic gives them one.
    return hashlib.sha256(relevant.SerializeToString(deterministic=True)).digest()


def _json(text: str, path: str) -> Any:
    try:
        # By default json also takes NaN, and refuses whole numbers of more than 4,300 digits.
        return json.loads(text, parse_constant=_refuse, parse_int=float)
    except (ValueError, RecursionError) as error:
        raise Unjudgeable("INVALID_METADATA", f"{path} is not JSON: {error}") from None


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")
