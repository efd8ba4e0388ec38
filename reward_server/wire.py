"""Between the contract's messages and the reward's own types."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from reward_server.kinds import Sample
from reward_server.memory import SampleKey
from reward_server.results import Abstained, Failed, FailureCode, Outcome, Pending, Scored
from rlhf.reward.v1 import reward_pb2

_MAX_TEXT_BYTES = 1024
_RESERVED_PREFIX = "rlhf."


def fingerprint(sample: reward_pb2.Sample, json_keys: frozenset[str]) -> bytes:
    """A digest of all that a score may depend on: the sample without its group, and which of its metadata is JSON."""
    # Taken out and put back: a copy without them would cost more than all the rest.
    group_id, group_size = sample.group_id, sample.group_size
    sample.ClearField("group_id")
    sample.ClearField("group_size")
    digest = hashlib.sha256(sample.SerializeToString(deterministic=True))
    sample.group_id, sample.group_size = group_id, group_size
    if json_keys and (own_json_keys := json_keys.intersection(sample.metadata)):
        digest.update(json.dumps(sorted(own_json_keys)).encode())
    return digest.digest()


def decode(run_id: str, sample: reward_pb2.Sample, json_keys: frozenset[str]) -> Sample | Failed:
    """The sample as a reward sees it, or why this server cannot judge it."""
    metadata: dict[str, Any] = {}
    columns = sample.metadata
    for key in columns:  # not items(), which protobuf leaves to slow generic code
        if key.startswith(_RESERVED_PREFIX):
            continue
        text = columns[key]
        try:
            value = _json(text) if key in json_keys else text
        except ValueError as error:
            return Failed(FailureCode.INVALID_METADATA, f"the column {key!r} is not JSON: {error}")
        # JSON null means what an absent key means: the row has no value.
        if value is not None:
            metadata[key] = value
    messages = []
    for index, message in enumerate(sample.messages):
        if any(part.WhichOneof("kind") is None for part in message.parts):
            return Failed(FailureCode.UNKNOWN_CONTENT, f"messages[{index}] has a part of a kind unknown here")
        try:
            extra = _json(message.extra_json) if message.extra_json else {}
        except ValueError as error:
            return Failed(FailureCode.INVALID_METADATA, f"messages[{index}].extra_json is not JSON: {error}")
        if not isinstance(extra, Mapping):
            return Failed(FailureCode.INVALID_METADATA, f"messages[{index}].extra_json is not a JSON object")
        messages.append({**extra, "role": message.role, "content": "".join(part.text for part in message.parts)})
    return Sample(
        prompt=sample.prompt,
        completion=sample.completion,
        completion_ids=tuple(sample.completion_token_ids) if sample.completion_token_ids else (),
        metadata=metadata,
        messages=messages,
        sampled_ranges=[(item.first, item.past_last) for item in sample.sampled_ranges]
        if sample.sampled_ranges
        else (),
        key=SampleKey(run_id, sample.sample_id),
        group_id=sample.group_id,
        fingerprint=fingerprint(sample, json_keys),
        message=sample,
        json_keys=json_keys,
    )


def _json(text: str) -> Any:
    """Raises ValueError for what is not JSON; NaN and infinities, which Python would take, are not."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def encode(outcome: Outcome, result: reward_pb2.SampleResult) -> None:
    """Write the outcome into `result` as the contract sends it: made apart and copied it would cost five times more."""
    match outcome:
        case Scored():
            scored = result.scored
            scored.reward = outcome.reward
            if outcome.components:
                scored.components.update(outcome.components)
            if outcome.token_rewards:
                scored.token_rewards.extend(outcome.token_rewards)
        case Abstained():
            result.abstained.reason = _short(outcome.reason)
        case Pending():
            # Rounded up: a Duration holds whole nanoseconds, and 0 would not be a time to come back.
            nanoseconds = max(1, round(outcome.retry_after * 1e9))
            result.pending.retry_after.FromNanoseconds(nanoseconds)
        case Failed():
            result.failed.code = outcome.code
            result.failed.message = _short(outcome.message)


def _short(text: str) -> str:
    """`text` in at most 1 KiB of UTF-8, which cannot hold lone surrogates."""
    encoded = text.encode("utf-8", errors="replace")
    if len(encoded) <= _MAX_TEXT_BYTES:
        return encoded.decode()
    return encoded[: _MAX_TEXT_BYTES - 3].decode("utf-8", errors="ignore") + "…"
