"""What a Score request must be, as reward.proto promises it; everything here is the caller's mistake."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from reward_server.kinds import Scope
from rlhf import failures
from rlhf.failures import FieldViolation
from rlhf.reward.v1 import reward_pb2

# Enough to see the pattern; the status details must stay small.
_MOST_VIOLATIONS = 8
_MAX_ID_BYTES = 256


def check_score_request(request: reward_pb2.ScoreRequest, *, max_samples: int, scope: Scope) -> None:
    """Raises RpcFailure (INVALID_ARGUMENT, with a field path for each mistake) unless the request is well formed."""
    violations = []
    for violation in _violations(request, max_samples, scope):
        violations.append(violation)
        if len(violations) == _MOST_VIOLATIONS:
            break
    if violations:
        raise failures.invalid_arguments(violations)


def _violations(request: reward_pb2.ScoreRequest, max_samples: int, scope: Scope) -> Iterator[FieldViolation]:
    yield from _id_violations("run_id", request.run_id)
    if not request.samples:
        yield FieldViolation("samples", "at least one sample is required")
    if len(request.samples) > max_samples:
        yield FieldViolation("samples", f"{len(request.samples)} samples; max_samples is {max_samples}")
        return
    first_index: dict[str, int] = {}
    for index, sample in enumerate(request.samples):
        sample_id = sample.sample_id
        if not 0 < len(sample_id.encode()) <= _MAX_ID_BYTES:
            yield from _id_violations(f"samples[{index}].sample_id", sample_id)
        first = first_index.setdefault(sample_id, index)
        if sample_id and first != index:
            yield FieldViolation(f"samples[{index}].sample_id", f"the same as samples[{first}].sample_id")
        if not sample.group_id:
            yield FieldViolation(f"samples[{index}].group_id", "required")
        if sample.sampled_ranges:
            yield from _range_violations(f"samples[{index}].sampled_ranges", sample)
    if scope is Scope.GROUP:
        yield from _group_violations(request)


def _group_violations(request: reward_pb2.ScoreRequest) -> Iterator[FieldViolation]:
    present = Counter(sample.group_id for sample in request.samples)
    for index, sample in enumerate(request.samples):
        size = sample.group_size or 1
        if sample.group_id and size != present[sample.group_id]:
            yield FieldViolation(
                f"samples[{index}].group_size",
                f"{size}, but {present[sample.group_id]} samples of group {sample.group_id[:64]!r} are in this call; "
                "this reward judges whole groups",
            )


def _id_violations(path: str, value: str) -> Iterator[FieldViolation]:
    if not value:
        yield FieldViolation(path, "required")
    elif len(value.encode()) > _MAX_ID_BYTES:
        yield FieldViolation(path, f"{len(value.encode())} bytes; the limit is {_MAX_ID_BYTES}")


def _range_violations(path: str, sample: reward_pb2.Sample) -> Iterator[FieldViolation]:
    count = len(sample.completion_token_ids)
    end = 0
    for index, token_range in enumerate(sample.sampled_ranges):
        if token_range.first < end:
            yield FieldViolation(f"{path}[{index}].first", f"below {end}, where the range before it ends")
        if token_range.past_last <= token_range.first:
            yield FieldViolation(f"{path}[{index}].past_last", f"must be above first, {token_range.first}")
        elif token_range.past_last > count:
            yield FieldViolation(f"{path}[{index}].past_last", f"beyond the {count} completion_token_ids")
        end = max(end, token_range.past_last)
