"""Requests with one mistake each, and the status code that the contract promises for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grpc

from reward_server.conformance.case import Broken, Level, case
from reward_server.conformance.exchange import Mistake
from reward_server.conformance.session import Session
from rlhf.reward.v1 import reward_pb2

# 258 bytes in 129 characters, and the most that is allowed, in 128.
_TOO_LONG = "é" * 129
_LONGEST = "é" * 128

_RUN_ID = 'Required, at most 256 bytes; empty = INVALID_ARGUMENT "run_id".'
_SAMPLE_ID = 'Required; empty, or the same as another\'s in this call = INVALID_ARGUMENT "samples[3].sample_id".'
_ID_LENGTH = f"{_SAMPLE_ID} At most 256 bytes."
_PAST_LAST = (
    "Index after the last token. Not above first, or beyond completion_token_ids = INVALID_ARGUMENT "
    '"samples[3].sampled_ranges[1].past_last".'
)
_ASCENDING = 'Ascending and without overlap, else INVALID_ARGUMENT "samples[3].sampled_ranges[1].first".'


def _sampled(sample: reward_pb2.Sample, *ranges: tuple[int, int]) -> None:
    sample.completion_token_ids[:] = [1, 2, 3, 4]
    for first, past_last in ranges:
        sample.sampled_ranges.add(first=first, past_last=past_last)


def _no_run(request: reward_pb2.ScoreRequest) -> None:
    request.run_id = ""


def _long_run(request: reward_pb2.ScoreRequest) -> None:
    request.run_id = _TOO_LONG


def _no_samples(request: reward_pb2.ScoreRequest) -> None:
    request.ClearField("samples")


def _no_sample_id(request: reward_pb2.ScoreRequest) -> None:
    request.samples[0].sample_id = ""


def _long_sample_id(request: reward_pb2.ScoreRequest) -> None:
    request.samples[0].sample_id += _TOO_LONG


def _same_sample_id(request: reward_pb2.ScoreRequest) -> None:
    request.samples[1].sample_id = request.samples[0].sample_id


def _no_group_id(request: reward_pb2.ScoreRequest) -> None:
    request.samples[0].group_id = ""


def _overlap(request: reward_pb2.ScoreRequest) -> None:
    _sampled(request.samples[0], (0, 3), (2, 4))


def _descending(request: reward_pb2.ScoreRequest) -> None:
    _sampled(request.samples[0], (2, 4), (0, 1))


def _empty_range(request: reward_pb2.ScoreRequest) -> None:
    _sampled(request.samples[0], (0, 1), (2, 2))


def _beyond(request: reward_pb2.ScoreRequest) -> None:
    _sampled(request.samples[0], (0, 1), (2, 5))


def _without_tokens(request: reward_pb2.ScoreRequest) -> None:
    _sampled(request.samples[0], (0, 1))
    request.samples[0].ClearField("completion_token_ids")


@dataclass(frozen=True)
class _Wrong:
    """A mistake: made by `spoil` in an ordinary request for `samples` samples, named by one of `paths`."""

    id: str
    sentence: str
    summary: str
    spoil: Callable[[reward_pb2.ScoreRequest], None]
    paths: Sequence[str]
    samples: int = 1


_RANGES = "samples[0].sampled_ranges"

_MISTAKES = (
    _Wrong("request/no-run-id", _RUN_ID, "An empty run_id", _no_run, ["run_id"]),
    _Wrong("request/long-run-id", _RUN_ID, "A run_id of more than 256 bytes", _long_run, ["run_id"]),
    _Wrong(
        "request/no-samples",
        'From 1 to max_samples, else INVALID_ARGUMENT "samples".',
        "A request without samples",
        _no_samples,
        ["samples"],
    ),
    _Wrong("request/no-sample-id", _SAMPLE_ID, "An empty sample_id", _no_sample_id, ["samples[0].sample_id"]),
    _Wrong(
        "request/long-sample-id",
        _ID_LENGTH,
        "A sample_id of more than 256 bytes",
        _long_sample_id,
        ["samples[0].sample_id"],
    ),
    _Wrong(
        "request/same-sample-id",
        _SAMPLE_ID,
        "The same sample_id twice",
        _same_sample_id,
        ["samples[1].sample_id", "samples[0].sample_id"],
        samples=2,
    ),
    _Wrong(
        "request/no-group-id",
        'Required; empty = INVALID_ARGUMENT "samples[3].group_id".',
        "An empty group_id",
        _no_group_id,
        ["samples[0].group_id"],
    ),
    _Wrong("request/overlapping-ranges", _ASCENDING, "sampled_ranges that overlap", _overlap, [f"{_RANGES}[1].first"]),
    _Wrong(
        "request/descending-ranges", _ASCENDING, "sampled_ranges that descend", _descending, [f"{_RANGES}[1].first"]
    ),
    _Wrong(
        "request/empty-range", _PAST_LAST, "A sampled range of no tokens", _empty_range, [f"{_RANGES}[1].past_last"]
    ),
    _Wrong(
        "request/range-beyond", _PAST_LAST, "A sampled range beyond the tokens", _beyond, [f"{_RANGES}[1].past_last"]
    ),
    _Wrong(
        "request/range-without-tokens",
        "Empty = all. MUST be empty if completion_token_ids is.",
        "sampled_ranges without token ids",
        _without_tokens,
        [_RANGES, f"{_RANGES}[0]", f"{_RANGES}[0].past_last"],
    ),
)


def _add(wrong: _Wrong) -> None:
    async def probe(session: Session) -> None:
        await _send(session, wrong)

    probe.__doc__ = f"{wrong.summary}: INVALID_ARGUMENT."
    case(wrong.id, Level.MUST, wrong.sentence)(probe)


async def _send(session: Session, wrong: _Wrong) -> None:
    request = session.request(session.samples(wrong.samples))
    wrong.spoil(request)
    mistake = Mistake((grpc.StatusCode.INVALID_ARGUMENT,), "INVALID_FIELD", tuple(wrong.paths))
    exchange = await session.settled(request, mistake=mistake)
    if exchange.code not in mistake.codes:
        raise Broken(f"expected INVALID_ARGUMENT for {wrong.summary[0].lower()}{wrong.summary[1:]}", exchange)


async def send_typical_mistakes(session: Session) -> None:
    """What the cases that watch statuses need."""
    for wrong in _MISTAKES[:3]:
        await _send(session, wrong)


for _wrong in _MISTAKES:
    _add(_wrong)


@case("request/longest-ids", Level.MUST, _ID_LENGTH)
async def longest_ids(session: Session) -> None:
    """A run_id and a sample_id of 256 bytes are taken."""
    (sample,) = session.samples(1)
    sample.sample_id = _LONGEST
    # As long in bytes, and another in every run of the kit.
    run_id = session.run_id + "r" * (len(_LONGEST.encode()) - len(session.run_id))
    await session.accepted(session.request([sample], run_id=run_id), "ids of 256 bytes")


@case(
    "request/malformed",
    Level.MUST,
    "A status is about the whole call; what is wrong with one sample alone is its FAILED.",
)
async def malformed(session: Session) -> None:
    """Bytes that are no request get a status: INTERNAL, UNKNOWN or INVALID_ARGUMENT, by gRPC library."""
    codes = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.INVALID_ARGUMENT)
    exchange = await session.score(b"\xff" * 16, mistake=Mistake(codes, "", ()))
    if exchange.code not in codes:
        raise Broken("expected a status for bytes that are no request", exchange)
