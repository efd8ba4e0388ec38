"""What GetRewardInfo says."""

from __future__ import annotations

import grpc

from reward_server.conformance.case import Broken, Level, NotApplicable, case
from reward_server.conformance.compare import expect_alike
from reward_server.conformance.exchange import Mistake
from reward_server.conformance.session import Session
from rlhf.reward.v1 import reward_pb2

_UNKNOWN = "conformance-no-such-reward"
_NO_SUCH_REWARD = Mistake((grpc.StatusCode.NOT_FOUND,), "NOT_FOUND", ("reward",))


@case("info/answers", Level.MUST, "GetRewardInfo describes a reward and its limits.")
async def answers(session: Session) -> None:
    """GetRewardInfo answers."""
    exchange = await session.describe(session.reward)
    if exchange.status is not None:
        raise Broken("no description", exchange)


@case("info/version", Level.MUST, "Required, never empty.", explained_by=("info/answers",))
async def version(session: Session) -> None:
    """The description has a version."""
    exchange = await session.describe(session.reward)
    if not session.info.version:
        raise Broken("version is empty", exchange)


@case(
    "info/name",
    Level.SHOULD,
    "Its name, for people, and for ScoreRequest.reward. SHOULD NOT be empty.",
    explained_by=("info/answers",),
)
async def name(session: Session) -> None:
    """The description has a name."""
    exchange = await session.describe(session.reward)
    if not session.info.name:
        raise Broken("name is empty", exchange)


@case("info/scope", Level.MUST, "A client MUST refuse a server with a value that it does not know.")
async def scope(session: Session) -> None:
    """The scope is one of the contract's."""
    exchange = await session.describe(session.reward)
    if session.info.scope not in reward_pb2.Scope.values():
        raise Broken(f"scope is {session.info.scope}", exchange)


@case(
    "info/by-name",
    Level.MUST,
    "Which of the server's rewards; empty = its default.",
    explained_by=("info/constant", "info/answers"),
)
async def by_name(session: Session) -> None:
    """A reward asked for by the name that it gives itself is the same reward."""
    if not session.info.name:
        raise NotApplicable("the reward has no name")
    exchange = await session.describe(session.info.name)
    if exchange.response != session.info:
        raise Broken(f"described by its name {session.info.name!r}, the reward is another", exchange)
    samples = session.unit()
    expected = await session.judge(samples)
    results = await session.judge(session.renamed(samples), reward=session.info.name)
    expect_alike(expected, results, "asked for by its name, the reward judges otherwise", session.last)


@case("info/unknown-reward", Level.MUST, "Unknown = NOT_FOUND.", explained_by=("info/answers",))
async def unknown_reward(session: Session) -> None:
    """Describing a reward that the server does not have is NOT_FOUND."""
    exchange = await session.describe(_UNKNOWN, _NO_SUCH_REWARD)
    if exchange.code not in _NO_SUCH_REWARD.codes:
        raise Broken(f"expected NOT_FOUND for the reward {_UNKNOWN!r}", exchange)


@case("score/unknown-reward", Level.MUST, 'a reward that the server does not have; the path is "reward"')
async def score_by_unknown_reward(session: Session) -> None:
    """Scoring by a reward that the server does not have is NOT_FOUND."""
    request = session.request(session.unit(), reward=_UNKNOWN)
    exchange = await session.settled(request, mistake=_NO_SUCH_REWARD)
    if exchange.code not in _NO_SUCH_REWARD.codes:
        raise Broken(f"expected NOT_FOUND for the reward {_UNKNOWN!r}", exchange)
