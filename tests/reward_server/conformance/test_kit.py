"""The kit passes servers that keep the contract, and names the one sentence that a server breaks."""

from __future__ import annotations

import pytest

from reward_server.conformance.case import CASES
from reward_server.conformance.material import Material
from reward_server.conformance.runner import Outcome, Verdict, run
from reward_server.conformance.session import Session
from reward_server.conformance.target import Target
from tests.reward_server.conformance.broken import BROKEN
from tests.reward_server.conformance.broken.marking import NeedsTiming
from tests.reward_server.conformance.free import FREE
from tests.reward_server.conformance.right_server import RightGroupServer, RightServer, serving

_ATTEMPTS = 3


async def judged(servicer: RightServer) -> Outcome:
    """What the kit says of a server, in a hurry that a busy machine can keep up with."""
    async with serving(servicer) as address:
        session = Session(Target(address), material=Material(), timeout=12.0, patience=5.0)
        async with session:
            return await run(session, list(CASES.values()))


def with_verdict(outcome: Outcome, verdict: Verdict) -> dict[str, str]:
    return {result.case.id: result.why for result in outcome.results if result.verdict is verdict}


@pytest.mark.parametrize("server", [RightServer, RightGroupServer, *FREE])
async def test_a_server_that_keeps_the_contract_passes_every_case_that_applies(server: type[RightServer]) -> None:
    outcome = await judged(server())
    assert with_verdict(outcome, Verdict.FAILED) == {}


@pytest.mark.parametrize(
    ("case_id", "server"), BROKEN, ids=[f"{server.__name__}-{case_id}" for case_id, server in BROKEN]
)
async def test_a_broken_server_fails_the_case_that_names_its_fault_and_no_other(
    case_id: str, server: type[RightServer]
) -> None:
    for _ in range(_ATTEMPTS):
        judged_one = server()
        outcome = await judged(judged_one)
        if not isinstance(judged_one, NeedsTiming) or judged_one.showed:
            break
    failed = with_verdict(outcome, Verdict.FAILED)
    assert failed.keys() == {case_id}, failed
