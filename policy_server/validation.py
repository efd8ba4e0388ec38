"""From protobuf requests to the engine's own types, or INVALID_ARGUMENT with the path of every wrong field.

What each mistake costs the caller is written in the .proto files; this module is where the server keeps that promise.
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
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_BYTES = 256
MAX_RUN_ID_BYTES = 256


@dataclass(frozen=True)
class Limits:
    """What requests to a model are checked against, in tokens."""

    vocab_size: int
    max_context_tokens: int
    default_max_new_tokens: int
    max_log_probs_tokens: int


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


def generation_request(
    violations: Violations,
    message: policy_pb2.GenerateRequest,
    limits: Limits,
    *,
    request_id: str,
    default_priority: protocol.Priority,
    stream_interval: int,
    path: str,
) -> protocol.GenerationRequest:
    """What the engine is asked for `message`, but for the ids of its prompt, which are still to be made.

    `path` is the prefix of every field path ("request." inside a streaming request).
    """
    sampling = _sampling(violations, message.sampling, limits, f"{path}sampling")
    prefix: tuple[int, ...] = ()
    if message.completion_prefix:
        violations.check(sampling.n == 1, f"{path}sampling.n", "must be 1 with a completion_prefix")
        length, most = len(message.completion_prefix), max(sampling.max_new_tokens, 1)
        if length < min(most, limits.max_context_tokens):
            prefix = tuple(message.completion_prefix)
            check_ids(violations, prefix, f"{path}completion_prefix", limits.vocab_size)
        elif length >= most:
            violations.add(
                f"{path}completion_prefix",
                f"its {length} tokens leave none of max_new_tokens = {sampling.max_new_tokens}",
            )
        else:
            violations.add(
                f"{path}prompt",
                f"the {length} tokens of completion_prefix leave no room within"
                f" max_context_tokens = {limits.max_context_tokens}",
            )
    for index, kind in enumerate(message.logprobs):
        violations.check(
            kind in LOGPROB_KINDS and kind not in message.logprobs[:index],
            f"{path}logprobs[{index}]",
            f"{_kind_name(kind)} is no kind that GetModel lists, or is repeated",
        )
    priority_known = message.priority in policy_pb2.Priority.values()
    violations.check(priority_known, f"{path}priority", f"{message.priority} is unknown here")
    return protocol.GenerationRequest(
        request_id=request_id,
        model=model_name(message.model),
        prompt_token_ids=(),
        sampling=sampling,
        completion_prefix=prefix,
        raw_logprobs=policy_pb2.LOG_PROB_KIND_RAW in message.logprobs,
        processed_logprobs=policy_pb2.LOG_PROB_KIND_PROCESSED in message.logprobs,
        weights=_precondition(violations, message, path),
        priority=protocol.Priority(message.priority) if message.priority and priority_known else default_priority,
        stream_interval=stream_interval,
    )


def check_room(prompt: Sequence[int], prefix: Sequence[int], limits: Limits, *, path: str) -> None:
    """Raise invalid_argument unless a token fits after prompt and prefix, and the prompt's ids are the model's."""
    violations = Violations()
    check_ids(violations, prompt, path, limits.vocab_size)  # a tokenizer may know more ids than its model
    violations.check(
        len(prompt) + len(prefix) < limits.max_context_tokens,
        path,
        f"its {len(prompt)} tokens and {len(prefix)} of completion_prefix leave no room for one more within"
        f" max_context_tokens = {limits.max_context_tokens}",
    )
    violations.raise_if_any()


def scoring_request(message: policy_pb2.LogProbsRequest, limits: Limits, *, request_id: str) -> protocol.ScoringRequest:
    """What the engine is asked for `message`. Raises invalid_argument."""
    violations = Violations()
    violations.check(bool(message.sequences), "sequences", "at least one is required")
    total = sum(len(each.prompt_token_ids) + len(each.completion_token_ids) for each in message.sequences)
    if total > limits.max_log_probs_tokens:  # checking each of so many would hold everybody up
        raise invalid_argument(
            "sequences", f"{total} tokens are more than max_log_probs_tokens = {limits.max_log_probs_tokens}"
        )
    sequences = []
    for index, sequence in enumerate(message.sequences):
        path = f"sequences[{index}]"
        prompt, completion = tuple(sequence.prompt_token_ids), tuple(sequence.completion_token_ids)
        for ids, name in ((prompt, "prompt_token_ids"), (completion, "completion_token_ids")):
            violations.check(bool(ids), f"{path}.{name}", "at least one token is required")
            check_ids(violations, ids, f"{path}.{name}", limits.vocab_size)
        length = len(prompt) + len(completion)
        violations.check(
            length <= limits.max_context_tokens,
            path,
            f"{length} tokens are more than max_context_tokens = {limits.max_context_tokens}",
        )
        sequences.append((prompt, completion))
    temperature = message.temperature if message.HasField("temperature") else 1.0
    violations.check(math.isfinite(temperature) and temperature > 0, "temperature", "must be finite and above 0")
    weights = _precondition(violations, message, "")
    violations.raise_if_any()
    return protocol.ScoringRequest(
        request_id=request_id,
        model=model_name(message.model),
        sequences=sequences,
        temperature=temperature,
        entropies=message.entropies,
        weights=weights,
    )


def require_request(message: policy_pb2.StreamGenerateRequest) -> policy_pb2.GenerateRequest:
    """The request inside a streaming request."""
    if not message.HasField("request"):
        raise invalid_argument("request", "required")
    return message.request


def stream_interval(violations: Violations, message: policy_pb2.StreamGenerateRequest) -> int:
    """Fewest new tokens in a message of a completion."""
    if not message.HasField("stream_interval"):
        return 1
    violations.check(message.stream_interval >= 1, "stream_interval", "must be at least 1")
    return message.stream_interval


def weights_version(message: policy_pb2.WeightsVersion) -> protocol.WeightsVersion:
    """The engine's form of a version."""
    return protocol.WeightsVersion(message.run_id, message.incarnation, message.version)


def check_ids(violations: Violations, ids: Sequence[int], path: str, vocab_size: int) -> None:
    """Note the first id that the model has no column for."""
    if ids and max(ids) >= vocab_size:
        index = next(index for index, token in enumerate(ids) if token >= vocab_size)
        violations.add(f"{path}[{index}]", f"token id {ids[index]} is not below vocab_size = {vocab_size}")


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
    violations.check(
        len(message.stop_strings) <= MAX_STOP_STRINGS, f"{path}.stop_strings", f"at most {MAX_STOP_STRINGS} are taken"
    )
    for index, text in enumerate(message.stop_strings):
        violations.check(
            1 <= len(text.encode()) <= MAX_STOP_STRING_BYTES,
            f"{path}.stop_strings[{index}]",
            f"must hold from 1 to {MAX_STOP_STRING_BYTES} bytes of UTF-8",
        )
    check_ids(violations, message.stop_token_ids, f"{path}.stop_token_ids", limits.vocab_size)
    n = message.n if message.HasField("n") else 1
    violations.check(1 <= n <= MAX_COMPLETIONS, f"{path}.n", f"must be from 1 to max_completions = {MAX_COMPLETIONS}")
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


def _precondition(
    violations: Violations, message: policy_pb2.GenerateRequest | policy_pb2.LogProbsRequest, path: str
) -> protocol.WeightsPrecondition:
    if not message.HasField("weights"):
        return protocol.WeightsPrecondition()
    rule = message.weights.WhichOneof("rule")
    violations.check(rule is not None, f"{path}weights.rule", "exact or min is required")
    if rule == "exact":
        return protocol.WeightsPrecondition(exact=weights_version(message.weights.exact))
    return protocol.WeightsPrecondition(minimum=weights_version(message.weights.min))


def _kind_name(kind: int) -> str:
    return policy_pb2.LogProbKind.Name(kind) if kind in policy_pb2.LogProbKind.values() else str(kind)
