"""Runs cases against a server, and says what came of each."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from reward_server.conformance import cases as _registered  # noqa: F401 - fills CASES
from reward_server.conformance.case import CASES, Broken, Case, Level, NotApplicable
from reward_server.conformance.exchange import Exchange
from reward_server.conformance.session import Session


class Verdict(enum.Enum):
    """What came of a case."""

    PASSED = "passed"
    FAILED = "failed"
    NOT_APPLICABLE = "not applicable"
    KNOWN_FAILURE = "known failure"


class ExitCode(enum.IntEnum):
    """How the kit ends; the numbers from 64 on are those of sysexits.h."""

    PASSED = 0
    MUST_FAILED = 1
    SHOULD_FAILED = 2
    USAGE = 64
    UNREACHABLE = 69


@dataclass(frozen=True)
class Result:
    """A case with its verdict; why: what is wrong, or why there is nothing to say."""

    case: Case
    verdict: Verdict
    seconds: float
    why: str = ""
    exchange: Exchange | None = None
    alone: bool = True


@dataclass(frozen=True)
class Outcome:
    """A whole run. stale: what is wrong with the file of known failures, one line for each entry."""

    results: Sequence[Result]
    stale: Sequence[str] = ()

    def count(self, verdict: Verdict, level: Level | None = None) -> int:
        """How many cases, of a level, ended so."""
        return sum(each.verdict is verdict and level in (None, each.case.level) for each in self.results)

    @property
    def exit_code(self) -> ExitCode:
        """The worst of it."""
        if self.stale or self.count(Verdict.FAILED, Level.MUST):
            return ExitCode.MUST_FAILED
        return ExitCode.SHOULD_FAILED if self.count(Verdict.FAILED) else ExitCode.PASSED


async def run(
    session: Session,
    cases: Sequence[Case],
    known: Mapping[str, str] | None = None,
    on_case: Callable[[Case], None] = lambda _: None,
) -> Outcome:
    """Run the cases in their order; `known`: reasons of known failures by case id."""
    await session.open()
    raised: dict[str, Broken | NotApplicable | None] = {}
    seconds: dict[str, float] = {}
    for each in cases:
        on_case(each)
        session.turn_to(each.id)
        began = time.monotonic()
        raised[each.id] = await _probe(each, session)
        seconds[each.id] = time.monotonic() - began
    for each in cases:
        if each.check is not None:
            raised[each.id] = _look(each, session.exchanges, raised[each.id])
    results = [_result(each, raised, seconds[each.id], known or {}) for each in cases]
    return Outcome(results, _stale(results, known or {}))


async def _probe(each: Case, session: Session) -> Broken | NotApplicable | None:
    try:
        await each.probe(session)
    except (Broken, NotApplicable) as verdict:
        return verdict
    return None


def _look(
    each: Case, exchanges: Sequence[Exchange], probed: Broken | NotApplicable | None
) -> Broken | NotApplicable | None:
    """What a watching case says of all exchanges; what came of its own probe counts when it saw nothing."""
    assert each.check is not None
    seen = False
    for exchange in exchanges:
        for problem in each.check(exchange):
            if problem is not None:
                return Broken(problem, exchange)
            seen = True
    return None if seen else probed or NotApplicable(each.absent)


def _result(
    each: Case, raised: Mapping[str, Broken | NotApplicable | None], seconds: float, known: Mapping[str, str]
) -> Result:
    verdict = raised[each.id]
    if verdict is None:
        return Result(each, Verdict.PASSED, seconds)
    if isinstance(verdict, NotApplicable):
        return Result(each, Verdict.NOT_APPLICABLE, seconds, str(verdict))
    if explanation := _explanation(each.id, raised, ()):
        return Result(each, Verdict.NOT_APPLICABLE, seconds, f"could not be judged: {explanation} failed")
    if each.id in known:
        return Result(each, Verdict.KNOWN_FAILURE, seconds, known[each.id], verdict.exchange, verdict.alone)
    return Result(each, Verdict.FAILED, seconds, verdict.message, verdict.exchange, verdict.alone)


def _explanation(
    case_id: str, raised: Mapping[str, Broken | NotApplicable | None], asking: tuple[str, ...]
) -> str | None:
    """The id of a failed case that explains this failure and is not explained itself."""
    verdict = raised.get(case_id)
    assert isinstance(verdict, Broken)
    for other in (*verdict.explained_by, *CASES[case_id].explained_by):
        # Two that explain each other would hide both.
        if other == case_id or other in asking or not isinstance(raised.get(other), Broken):
            continue
        return _explanation(other, raised, (*asking, case_id)) or other
    return None


def _stale(results: Sequence[Result], known: Mapping[str, str]) -> list[str]:
    passed = {each.case.id for each in results if each.verdict is Verdict.PASSED}
    stale = [f"{case_id} passes" for case_id in known if case_id in passed]
    return stale + [f"there is no case {case_id}" for case_id in known if case_id not in CASES]
