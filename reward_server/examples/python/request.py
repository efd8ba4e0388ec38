"""What a Score request must be; reward.proto says so at each field."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from rlhf.reward.v1 import reward_pb2

MAX_SAMPLES = 256
_MAX_ID_BYTES = 256


class Violation(NamedTuple):
    """A wrong field, by its path in the request, and what is wrong with it."""

    field: str
    description: str


def violations(request: reward_pb2.ScoreRequest) -> Iterator[Violation]:
    """Every wrong field of the request, in order."""
    yield from _wrong_id("run_id", request.run_id)
    if not 1 <= len(request.samples) <= MAX_SAMPLES:
        yield Violation("samples", f"{len(request.samples)} samples; from 1 to {MAX_SAMPLES} are allowed")
        return
    first_use: dict[str, int] = {}
    for index, sample in enumerate(request.samples):
        path = f"samples[{index}]"
        yield from _wrong_id(f"{path}.sample_id", sample.sample_id)
        first = first_use.setdefault(sample.sample_id, index)
        if sample.sample_id and first != index:
            yield Violation(f"{path}.sample_id", f"the same as samples[{first}].sample_id")
        if not sample.group_id:
            yield Violation(f"{path}.group_id", "required")
        yield from _wrong_ranges(f"{path}.sampled_ranges", sample)


def _wrong_id(path: str, value: str) -> Iterator[Violation]:
    size = len(value.encode())
    if size == 0:
        yield Violation(path, "required")
    elif size > _MAX_ID_BYTES:
        yield Violation(path, f"{size} bytes; the limit is {_MAX_ID_BYTES}")


def _wrong_ranges(path: str, sample: reward_pb2.Sample) -> Iterator[Violation]:
    tokens, end = len(sample.completion_token_ids), 0
    for index, span in enumerate(sample.sampled_ranges):
        if span.first < end:
            yield Violation(f"{path}[{index}].first", f"{span.first} is below {end}, where the range before it ends")
        if span.past_last <= span.first:
            yield Violation(f"{path}[{index}].past_last", f"{span.past_last} is not above first, {span.first}")
        elif span.past_last > tokens:
            yield Violation(f"{path}[{index}].past_last", f"{span.past_last} is beyond the {tokens} token ids")
        end = max(end, span.past_last)
