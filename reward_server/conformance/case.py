"""What a case is: a stable id, the sentence of the contract that it looks at, and how it looks."""

from __future__ import annotations

import enum
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reward_server.conformance.exchange import Exchange

if TYPE_CHECKING:
    from reward_server.conformance.session import Session

Probe = Callable[["Session"], Awaitable[None]]
# One item for everything that it looked at in an exchange: what is wrong with it, None = nothing.
Check = Callable[[Exchange], Iterator[str | None]]


class Level(enum.Enum):
    """How strongly the contract puts it (RFC 2119)."""

    MUST = "MUST"
    SHOULD = "SHOULD"


@dataclass(frozen=True)
class Case:
    """One sentence of the contract, and how a server is held to it.

    probe: sends what is needed, and raises Broken or NotApplicable. check: set on a watching case, which looks at
    every exchange of the run, whichever case made it; `absent` says what there was not when it had nothing to look
    at. explained_by: ids of cases whose failure makes one here say nothing new.
    """

    id: str
    level: Level
    sentence: str
    summary: str
    probe: Probe
    check: Check | None = None
    absent: str = ""
    explained_by: tuple[str, ...] = ()


class Broken(Exception):  # noqa: N818 - a verdict
    """The server broke the sentence of a case.

    exchange: the one that shows it best. alone: False when sending that request again by itself shows nothing, as
    the fault lies between several. explained_by: as on a case, for this failure alone.
    """

    def __init__(
        self,
        message: str,
        exchange: Exchange | None = None,
        *,
        alone: bool = True,
        explained_by: tuple[str, ...] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.exchange = exchange
        self.alone = alone
        self.explained_by = explained_by


class NotApplicable(Exception):  # noqa: N818 - a verdict
    """The sentence says nothing about this server; the message says why."""


CASES: dict[str, Case] = {}
"""Every case by its id, in the order in which they run; reward_server/conformance/cases fills it."""


def case(case_id: str, level: Level, sentence: str, *, explained_by: tuple[str, ...] = ()) -> Callable[[Probe], Probe]:
    """Make a case of a probe; its docstring is the summary."""

    def register(probe: Probe) -> Probe:
        _add(Case(case_id, level, sentence, _summary(probe), probe, explained_by=explained_by))
        return probe

    return register


def watch(
    case_id: str, level: Level, sentence: str, *, absent: str, probe: Probe | None = None
) -> Callable[[Check], Check]:
    """Make a watching case of a check; without a probe of its own, ordinary samples are sent."""

    def register(check: Check) -> Check:
        _add(Case(case_id, level, sentence, _summary(check), probe or _survey, check, absent))
        return check

    return register


async def _survey(session: Session) -> None:
    await session.survey()


def _add(new: Case) -> None:
    assert new.id not in CASES, f"two cases are called {new.id}"
    CASES[new.id] = new


def _summary(function: Callable[..., object]) -> str:
    assert function.__doc__, "a case says in its docstring what it does"
    return " ".join(function.__doc__.split())
