"""What has to hold after everything else."""

from __future__ import annotations

from reward_server.conformance.case import Broken, Level, NotApplicable, case
from reward_server.conformance.cases.health import health_of
from reward_server.conformance.compare import expect_alike
from reward_server.conformance.session import Session
from reward_server.conformance.wire import SERVICE


@case("pending/resolved", Level.SHOULD, "Not judged yet, but it may be later: a queue, a person, a judge that is down.")
async def resolved(session: Session) -> None:
    """Samples that were PENDING are judged within the patience of the kit."""
    await session.survey()
    if session.unresolved is not None:
        raise Broken("samples stay PENDING", session.unresolved, alone=False)
    if not any(result.HasField("pending") for each in session.exchanges for _, result in each.judgements()):
        raise NotApplicable("no sample was PENDING")


@case(
    "info/constant", Level.MUST, "The answer MUST NOT change while the process lives.", explained_by=("info/answers",)
)
async def constant(session: Session) -> None:
    """GetRewardInfo says what it said at first."""
    exchange = await session.describe(session.reward)
    if exchange.response != session.info:
        raise Broken(f"version {session.info.version!r} at first, and now another description", exchange, alone=False)


@case(
    "closing/first-answers",
    Level.MUST,
    "Scored, Abstained and Failed are final: sent again while the server remembers it, the sample MUST get the same "
    "answer.",
    explained_by=(
        "repeats/same-answer",
        "repeats/final-stays-final",
        "health/service",
        "cancel/asked-again",
        "cancel/keeps-serving",
        "deadline/asked-again",
    ),
)
async def first_answers(session: Session) -> None:
    """After all of this the server serves, and answers the first batch as it did at first."""
    samples, first = await session.survey()
    health = await health_of(session, SERVICE)
    if health != "SERVING":
        raise Broken(f"the health of {SERVICE!r} is {health}")
    expect_alike(first, await session.judge(samples), "at first and at last", session.last)
