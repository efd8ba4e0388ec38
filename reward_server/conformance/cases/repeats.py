"""The same sample again: its first answer; other content under its id: never that answer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from reward_server.conformance.case import Broken, Level, NotApplicable, case
from reward_server.conformance.compare import Results, alike, all_alike, expect_alike, kind, shown
from reward_server.conformance.session import Session
from rlhf.reward.v1 import reward_pb2

IDEMPOTENT = "Score is idempotent by (run_id, sample_id): a client MAY send a sample again at any time, in any company."
_FINAL = (
    "Scored, Abstained and Failed are final: sent again while the server remembers it, the sample MUST get the same "
    "answer."
)
_REPEATED_AT_ONCE = 4
_SEVERAL = 8
_HASTY_CALLS = 8
_ATTEMPTS_TO_DIFFER = 12
_CLASH = "SAMPLE_ID_CLASH"


@case("repeats/final-stays-final", Level.MUST, _FINAL)
async def final_stays_final(session: Session) -> None:
    """A sample that was scored, abstained from or failed is so again."""
    samples, first = await session.survey()
    again = await session.answered(session.request(samples))
    results = {sample.sample_id: result for sample, result in again.judgements()}
    for before in first:
        after = results[before.sample_id]
        # What was forgotten may have to be waited for once more.
        if kind(after) != kind(before) and (session.remembers or not after.HasField("pending")):
            raise Broken(f"{before.sample_id} was {shown(before)} and is {shown(after)}", again, alone=False)


@case("repeats/same-answer", Level.MUST, IDEMPOTENT, explained_by=("repeats/final-stays-final",))
async def same_answer(session: Session) -> None:
    """A batch that is sent again gets the same answers: to the last bit where the server promises to remember."""
    samples, first = await session.survey()
    expect_same(session, first, await session.judge(samples), "sent again")


@case(
    "repeats/other-company",
    Level.MUST,
    IDEMPOTENT,
    explained_by=("repeats/same-answer", "repeats/final-stays-final", "score/split-merge-reorder", "groups/company"),
)
async def other_company(session: Session) -> None:
    """A sample, or a group, that is sent again beside others gets the same answer."""
    samples, others = session.unit(), session.unit()
    if session.info.max_samples and len(samples) + len(others) > session.info.max_samples:
        raise NotApplicable("the server takes no two at a time")
    first = await session.judge(samples)
    again = await session.judge([*others, *samples])
    expect_same(session, first, again[len(others) :], "sent again beside others")


@case(
    "repeats/at-once",
    Level.MUST,
    IDEMPOTENT,
    explained_by=("repeats/same-answer", "repeats/final-stays-final", "limits/concurrent-calls"),
)
async def at_once(session: Session) -> None:
    """A batch that is sent several times at once gets the same answers in all calls."""
    samples = session.samples(min(_REPEATED_AT_ONCE, session.info.max_samples or _REPEATED_AT_ONCE))
    calls = min(_REPEATED_AT_ONCE, session.info.max_concurrent_calls or _REPEATED_AT_ONCE)
    if calls == 1:
        raise NotApplicable("the server takes one call at a time")
    first, *others = await asyncio.gather(*(session.judge(samples) for _ in range(calls)))
    for other in others:
        expect_same(session, first, other, f"sent {calls} times at once")


@case(
    "repeats/other-content",
    Level.MUST,
    "A server that remembers a sample MUST answer FAILED with the code SAMPLE_ID_CLASH when the id comes with other "
    "content.",
)
async def other_content(session: Session) -> None:
    """An id that comes back with other content is a clash, or is judged by what it holds now."""
    samples, other, first, expected = await _differing(session)
    results = await session.judge(_under_ids_of(samples, other))
    for old, new, result in zip(first, expected, results, strict=True):
        if result.failed.code == _CLASH:
            continue
        if session.remembers:
            raise Broken(f"expected {_CLASH}, as the server promises to remember", session.last, alone=False)
        if not alike(new, result):
            raise Broken(
                f"the first content is {shown(old)}, the other one {shown(new)}, and under the id of the first "
                f"{shown(result)}",
                session.last,
                alone=False,
            )


@case(
    "pending/asked-early",
    Level.MUST,
    "The client adds jitter and MAY ask earlier; a server MUST NOT count it against the sample.",
    explained_by=("repeats/same-answer", "repeats/final-stays-final", "score/split-merge-reorder", "groups/company"),
)
async def asked_early(session: Session) -> None:
    """PENDING samples that are asked for again at once, several times, come out as those that were waited for."""
    samples = session.samples(min(_SEVERAL, session.info.max_samples or _SEVERAL))
    expected = await session.judge(samples)
    hasty = session.renamed(samples)
    exchanges = [await session.answered(session.request(hasty)) for _ in range(_HASTY_CALLS)]
    if not any(result.HasField("pending") for each in exchanges for _, result in each.judgements()):
        raise NotApplicable("no sample was PENDING")
    expect_alike(expected, await session.judge(hasty), "waited for, and asked for at once", session.last)


@case("repeats/other-run", Level.MUST, "The training run. sample_id and group_id are unique within it.")
async def other_run(session: Session) -> None:
    """The same id in another run is another sample."""
    samples, other, _, expected = await _differing(session)
    results = await session.judge(_under_ids_of(samples, other), run_id=f"{session.run_id}-other")
    expect_alike(expected, results, "an id of another run", session.last)


def expect_same(session: Session, first: Results, again: Results, when: str) -> None:
    """Raises Broken for a sample with another answer: to the last bit only where the server promises to remember."""
    expect_alike(first, again, when, session.last)
    for before, after in zip(first, again, strict=True):
        if session.remembers and before != after:
            raise Broken(
                f"{when}, {before.sample_id} was {shown(before)} and is {shown(after)}", session.last, alone=False
            )


async def _differing(
    session: Session,
) -> tuple[Sequence[reward_pb2.Sample], Sequence[reward_pb2.Sample], Results, Results]:
    """Two units that are judged differently, and how."""
    samples = session.unit()
    first = await session.judge(samples)
    for _ in range(_ATTEMPTS_TO_DIFFER):
        other = session.unit()
        expected = await session.judge(other)
        if not all_alike(first, expected):
            return samples, other, first, expected
    raise NotApplicable("no two contents with different results were found")


def _under_ids_of(samples: Sequence[reward_pb2.Sample], other: Sequence[reward_pb2.Sample]) -> list[reward_pb2.Sample]:
    mixed = []
    for sample, content in zip(samples, other, strict=True):
        copy = reward_pb2.Sample()
        copy.CopyFrom(content)
        copy.sample_id, copy.group_id = sample.sample_id, sample.group_id
        mixed.append(copy)
    return mixed
