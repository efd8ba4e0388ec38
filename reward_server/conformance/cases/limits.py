"""The limits that a server declares, from below and from above."""

from __future__ import annotations

import asyncio

import grpc

from reward_server.conformance.case import Broken, Level, NotApplicable, case
from reward_server.conformance.exchange import Exchange, Mistake
from reward_server.conformance.session import Session, basics
from rlhf.reward.v1 import reward_pb2

_PADDING = "conformance_padding"
_MOST_BYTES = 128 << 20
_MOST_CALLS = 64
_BEYOND = 8
_TOO_LARGE = Mistake(
    (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.OUT_OF_RANGE, grpc.StatusCode.CANCELLED), "", ()
)


@case(
    "limits/largest-request",
    Level.MUST,
    "Largest encoded ScoreRequest in bytes; 0 = 4 MiB (4194304), gRPC's default.",
)
async def largest_request(session: Session) -> None:
    """A request of max_request_bytes is taken."""
    size = session.max_request_bytes
    await session.accepted(_of_size(session, size), f"a request of {size} bytes, the limit", watched=False)


@case(
    "limits/larger-request",
    Level.MUST,
    "| RESOURCE_EXHAUSTED | TOO_LARGE | without RetryInfo: the request is larger than max_request_bytes (OUT_OF_RANGE "
    "or CANCELLED from some gRPC libraries) | no: cut it |",
)
async def larger_request(session: Session) -> None:
    """A larger request is RESOURCE_EXHAUSTED without RetryInfo (OUT_OF_RANGE, CANCELLED by some gRPC libraries)."""
    size = session.max_request_bytes + 1024
    exchange = await session.settled(_of_size(session, size), mistake=_TOO_LARGE)
    if exchange.code not in _TOO_LARGE.codes:
        raise Broken(f"expected RESOURCE_EXHAUSTED for {size} bytes, above the limit", exchange)
    if exchange.status is not None and exchange.status.retry_seconds is not None:
        raise Broken("RetryInfo makes a client send again what stays too large", exchange)


@case("limits/concurrent-calls", Level.SHOULD, "Most calls that one client SHOULD have open at a time; 0 = no limit.")
async def concurrent_calls(session: Session) -> None:
    """As many calls at once as the server declares are all answered."""
    if not session.info.max_concurrent_calls:
        raise NotApplicable("max_concurrent_calls is 0: no limit")
    for exchange in await _at_once(session, min(_MOST_CALLS, session.info.max_concurrent_calls)):
        if exchange.status is not None:
            raise Broken("no answer within max_concurrent_calls", exchange, alone=False, explained_by=basics(exchange))


@case(
    "limits/overload",
    Level.MUST,
    "| RESOURCE_EXHAUSTED | OVERLOADED | with RetryInfo: too many calls or samples at once | after the delay |",
    explained_by=("limits/concurrent-calls",),
)
async def overload(session: Session) -> None:
    """More calls at once than the server declares are answered, or RESOURCE_EXHAUSTED."""
    declared = min(_MOST_CALLS, session.info.max_concurrent_calls or _MOST_CALLS)
    for exchange in await _at_once(session, declared + _BEYOND):
        if exchange.code not in (grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED):
            raise Broken(
                "expected an answer or RESOURCE_EXHAUSTED", exchange, alone=False, explained_by=basics(exchange)
            )


async def _at_once(session: Session, calls: int) -> list[Exchange]:
    requests = [session.request(session.samples(1)) for _ in range(calls)]
    return list(await asyncio.gather(*map(session.score, requests)))


def _of_size(session: Session, size: int) -> reward_pb2.ScoreRequest:
    """A request of exactly `size` bytes, padded with a column that costs the judge nothing."""
    if size > _MOST_BYTES:
        raise NotApplicable(f"the kit sends no request of {size} bytes")
    (sample,) = session.samples(1)
    sample.metadata[_PADDING] = ""
    request = session.request([sample])
    padding = size - request.ByteSize()
    if padding < 0:
        raise NotApplicable(f"one sample is larger than {size} bytes")
    # The lengths in the encoding grow with the text, so the second cut is by what the first was off.
    for _ in range(4):
        request.samples[0].metadata[_PADDING] = "x" * padding
        padding -= request.ByteSize() - size
    return request
