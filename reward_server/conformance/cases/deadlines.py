"""Calls that end early: at their deadline, or because the client went away."""

from __future__ import annotations

import asyncio

import grpc

from reward_server.conformance.case import Broken, Level, case
from reward_server.conformance.cases.repeats import IDEMPOTENT, expect_same
from reward_server.conformance.session import Session, basics

_SAMPLES = 4
_MOST_SAMPLES = 32
_MOST_CALLS = 32
_DEFAULT_CALLS = 8
_HOPELESS_SECONDS = 0.01
_ABANDONED_AFTER_SECONDS = 0.02
_ORDINARY_TO_SHORT = 4


@case(
    "deadline/answered-in-time",
    Level.MUST,
    "A server MUST answer within the call's deadline: what takes longer is PENDING.",
)
async def answered_in_time(session: Session) -> None:
    """A call with a quarter of the ordinary deadline is answered, be it with PENDING."""
    request = session.request(session.samples(_count(session, _SAMPLES)))
    exchange = await session.settled(request, within=session.timeout / _ORDINARY_TO_SHORT)
    if exchange.code is grpc.StatusCode.DEADLINE_EXCEEDED:
        raise Broken(f"no answer within {session.timeout / _ORDINARY_TO_SHORT:g} s", exchange)
    if exchange.status is not None:
        raise Broken("no answer", exchange, explained_by=basics(exchange))


@case(
    "deadline/asked-again",
    Level.MUST,
    "After any status but OK nothing is known of any sample of the call.",
)
async def asked_again_after_deadline(session: Session) -> None:
    """Samples whose call ran into a deadline of a few milliseconds are judged when they come again."""
    samples = session.samples(_count(session, _SAMPLES))
    exchange = await session.score(session.request(samples), within=_HOPELESS_SECONDS)
    # Some servers end a call at its deadline before the client does.
    in_order = (grpc.StatusCode.OK, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)
    if exchange.code not in in_order and not (exchange.status and exchange.status.passing):
        raise Broken("expected an answer or DEADLINE_EXCEEDED", exchange, explained_by=basics(exchange))
    await session.judge(samples)


@case(
    "cancel/asked-again",
    Level.MUST,
    IDEMPOTENT,
    explained_by=("repeats/same-answer", "repeats/final-stays-final"),
)
async def asked_again_after_cancel(session: Session) -> None:
    """Samples whose call was cancelled are judged when they come again, and then stay the same."""
    samples = session.samples(_count(session, _MOST_SAMPLES))
    await session.abandon(session.request(samples), _ABANDONED_AFTER_SECONDS)
    first = await session.judge(samples)
    expect_same(session, first, await session.judge(samples), "sent again after a cancelled call")


@case(
    "cancel/keeps-serving",
    Level.SHOULD,
    "A server SHOULD stop work for a call that was cancelled.",
    explained_by=("cancel/asked-again",),
)
async def keeps_serving(session: Session) -> None:
    """Cancelled calls, as many as the server takes at once and twice over, leave room for the next one."""
    calls = min(_MOST_CALLS, session.info.max_concurrent_calls or _DEFAULT_CALLS)
    for _ in range(2):
        requests = [session.request(session.samples(_count(session, _MOST_SAMPLES))) for _ in range(calls)]
        await asyncio.gather(*(session.abandon(request, _ABANDONED_AFTER_SECONDS) for request in requests))
    await session.answered(session.request(session.samples(1)))


def _count(session: Session, most: int) -> int:
    return min(most, session.info.max_samples or most)
