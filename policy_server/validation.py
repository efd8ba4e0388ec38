"""From protobuf requests to the engine's own types, or INVALID_ARGUMENT with the path of every wrong field.

What a mistake costs the caller is written in the .proto files; this module is where the server keeps that promise.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from policy_server.engine import protocol
from rlhf.failures import FieldViolation, invalid_argument, invalid_arguments
from rlhf.policy.v1 import policy_pb2

# Status details travel in trailers of a few KB: name the first mistakes, not each of a million.
_MOST_VIOLATIONS = 10

POLICY = "policy"
LOGPROB_KINDS = frozenset({policy_pb2.LOG_PROB_KIND_RAW, policy_pb2.LOG_PROB_KIND_PROCESSED})
MAX_COMPLETIONS = 1024
MAX_LOG_PROBS_TOKENS = 1 << 20


@dataclass(frozen=True)
class Limits:
    """What requests are checked against; token counts unless said otherwise."""

    vocab_size: int
    max_context_tokens: int
    default_max_new_tokens: int


class Violations:
    """Collects wrong fields, so that a caller mends them all at once."""

    def __init__(self) -> None:
        self._found: list[FieldViolation] = []

    def add(self, field: str, description: str) -> None:
        """Note that the field at this path is wrong."""
        if len(self._found) < _MOST_VIOLATIONS:
            self._found.append(FieldViolation(field, description))

    def check(self, holds: bool, field: str, description: str) -> None:
        """Note it unless `holds`."""
        if not holds:
            self.add(field, description)

    def raise_if_any(self) -> None:
        """Raise invalid_argument naming all that was found."""
        if self._found:
            raise invalid_arguments(self._found)


def model_name(model: str) -> str:
    """The engine's name for a model of a request, where empty means the policy."""
    return model or POLICY


def require_request(message: policy_pb2.StreamGenerateRequest) -> policy_pb2.GenerateRequest:
    """The request inside a streaming request."""
    if not message.HasField("request"):
        raise invalid_argument("request", "required")
    return message.request


def generation_request(
    message: policy_pb2.GenerateRequest,
    prompt_token_ids: tuple[int, ...],
    limits: Limits,
    *,
    request_id: str,
    default_priority: protocol.Priority,
    stream_interval: int,
    path: str,
) -> protocol.GenerationRequest:
    """What the engine is asked for `message`, whose prompt was encoded to `prompt_token_ids`.

    `path` is the prefix of every field path ("request." inside a streaming request). Raises invalid_argument.
    """
    violations = Violations()
    prompt_field = f"{path}prompt.{message.prompt.WhichOneof('kind')}"
    if message.prompt.WhichOneof("kind") == "token_ids":
        prompt_field += ".ids"
    _check_ids(violations, prompt_token_ids, prompt_field, limits.vocab_size)
    _check_ids(violations, message.completion_prefix, f"{path}completion_prefix", limits.vocab_size)
    room = limits.max_context_tokens - len(prompt_token_ids) - len(message.completion_prefix)
    too_long = message.completion_prefix if len(prompt_token_ids) < limits.max_context_tokens else None
    violations.check(
        room >= 1,
        f"{path}completion_prefix" if too_long else prompt_field,
        f"{len(prompt_token_ids)} prompt tokens and {len(message.completion_prefix)} of the completion leave no room"
        f" for another within the {limits.max_context_tokens} tokens of the model's context",
    )
    sampling = _sampling(violations, message.sampling, limits, f"{path}sampling")
    if message.completion_prefix:
        violations.check(sampling.n == 1, f"{path}sampling.n", "must be 1 with a completion_prefix")
        violations.check(
            len(message.completion_prefix) < sampling.max_new_tokens,
            f"{path}completion_prefix",
            f"its {len(message.completion_prefix)} tokens leave none of max_new_tokens = {sampling.max_new_tokens}",
        )
    for index, kind in enumerate(message.logprobs):
        violations.check(
            kind in LOGPROB_KINDS, f"{path}logprobs[{index}]", f"{_kind_name(kind)} is not a kind GetModel lists"
        )
    violations.check(
        message.priority in policy_pb2.Priority.values(),
        f"{path}priority",
        f"{message.priority} is not a priority this server knows",
    )
    weights = _precondition(message.weights)
    violations.raise_if_any()
    return protocol.GenerationRequest(
        request_id=request_id,
        model=model_name(message.model),
        prompt_token_ids=prompt_token_ids,
        sampling=sampling,
        completion_prefix=tuple(message.completion_prefix),
        raw_logprobs=policy_pb2.LOG_PROB_KIND_RAW in message.logprobs,
        processed_logprobs=policy_pb2.LOG_PROB_KIND_PROCESSED in message.logprobs,
        weights=weights,
        priority=protocol.Priority(message.priority) if message.priority else default_priority,
        stream_interval=stream_interval,
    )


def scoring_request(message: policy_pb2.LogProbsRequest, limits: Limits, *, request_id: str) -> protocol.ScoringRequest:
    """What the engine is asked for `message`. Raises invalid_argument."""
    violations = Violations()
    violations.check(bool(message.sequences), "sequences", "at least one is required")
    sequences = []
    for index, sequence in enumerate(message.sequences):
        path = f"sequences[{index}]"
        prompt, completion = tuple(sequence.prompt_token_ids), tuple(sequence.completion_token_ids)
        for ids, name in ((prompt, "prompt_token_ids"), (completion, "completion_token_ids")):
            violations.check(bool(ids), f"{path}.{name}", "at least one token is required")
            _check_ids(violations, ids, f"{path}.{name}", limits.vocab_size)
        length = len(prompt) + len(completion)
        violations.check(
            length <= limits.max_context_tokens,
            path,
            f"{length} tokens, but the model's context holds {limits.max_context_tokens}",
        )
        sequences.append((prompt, completion))
    total = sum(len(prompt) + len(completion) for prompt, completion in sequences)
    violations.check(
        total <= MAX_LOG_PROBS_TOKENS, "sequences", f"{total} tokens, but one call takes {MAX_LOG_PROBS_TOKENS}"
    )
    temperature = message.temperature if message.HasField("temperature") else 1.0
    violations.check(math.isfinite(temperature) and temperature > 0, "temperature", "must be finite and above 0")
    weights = _precondition(message.weights)
    violations.raise_if_any()
    return protocol.ScoringRequest(
        request_id=request_id,
        model=model_name(message.model),
        sequences=sequences,
        temperature=temperature,
        entropies=message.entropies,
        weights=weights,
    )


def stream_interval(message: policy_pb2.StreamGenerateRequest) -> int:
    """Least number of new tokens per message of a completion."""
    if not message.HasField("stream_interval"):
        return 1
    if message.stream_interval < 1:
        raise invalid_argument("stream_interval", "must be at least 1")
    return message.stream_interval


def weights_version(message: policy_pb2.WeightsVersion) -> protocol.WeightsVersion:
    """The engine's form of a version."""
    return protocol.WeightsVersion(message.run_id, message.incarnation, message.version)


def _sampling(
    violations: Violations, message: policy_pb2.SamplingParams, limits: Limits, path: str
) -> protocol.Sampling:
    temperature = message.temperature if message.HasField("temperature") else 1.0
    violations.check(
        math.isfinite(temperature) and temperature >= 0, f"{path}.temperature", "must be finite and at least 0"
    )
    top_p = message.top_p if message.HasField("top_p") else 1.0
    violations.check(0 < top_p <= 1, f"{path}.top_p", "must be above 0 and at most 1")
    min_p = message.min_p if message.HasField("min_p") else 0.0
    violations.check(0 <= min_p <= 1, f"{path}.min_p", "must be at least 0 and at most 1")
    penalty = message.repetition_penalty if message.HasField("repetition_penalty") else 1.0
    violations.check(math.isfinite(penalty) and penalty > 0, f"{path}.repetition_penalty", "must be finite and above 0")
    max_new = message.max_new_tokens if message.HasField("max_new_tokens") else limits.default_max_new_tokens
    violations.check(max_new >= 1, f"{path}.max_new_tokens", "must be at least 1")
    violations.check(
        message.min_new_tokens <= max_new, f"{path}.min_new_tokens", f"must be at most max_new_tokens = {max_new}"
    )
    for index, text in enumerate(message.stop_strings):
        violations.check(bool(text), f"{path}.stop_strings[{index}]", "must not be empty")
    _check_ids(violations, message.stop_token_ids, f"{path}.stop_token_ids", limits.vocab_size)
    n = message.n if message.HasField("n") else 1
    violations.check(1 <= n <= MAX_COMPLETIONS, f"{path}.n", f"must be from 1 to {MAX_COMPLETIONS}")
    return protocol.Sampling(
        temperature=temperature,
        top_k=message.top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=penalty,
        max_new_tokens=max_new,
        min_new_tokens=message.min_new_tokens,
        stop_strings=tuple(message.stop_strings),
        stop_token_ids=frozenset(message.stop_token_ids),
        seed=message.seed if message.HasField("seed") else secrets.randbits(64),
        n=n,
    )


def _precondition(message: policy_pb2.WeightsPrecondition) -> protocol.WeightsPrecondition:
    rule = message.WhichOneof("rule")
    if rule == "exact":
        return protocol.WeightsPrecondition(exact=weights_version(message.exact))
    if rule == "min":
        return protocol.WeightsPrecondition(minimum=weights_version(message.min))
    return protocol.WeightsPrecondition()


def _check_ids(violations: Violations, ids: Sequence[int], path: str, vocab_size: int) -> None:
    if ids and max(ids) >= vocab_size:
        index = next(index for index, token in enumerate(ids) if token >= vocab_size)
        violations.add(f"{path}[{index}]", f"token id {ids[index]} is not below the vocabulary size {vocab_size}")


def _kind_name(kind: int) -> str:
    return policy_pb2.LogProbKind.Name(kind) if kind in policy_pb2.LogProbKind.values() else str(kind)
