"""What a group is to a server that compares its samples, and to one that doesn't."""

from __future__ import annotations

from collections.abc import Iterator

import grpc

from reward_server.conformance.case import Broken, Level, NotApplicable, case, watch
from reward_server.conformance.compare import expect_alike
from reward_server.conformance.exchange import Exchange, Mistake
from reward_server.conformance.session import Session
from rlhf.reward.v1 import reward_pb2

_SEVERAL = 3
_WHOLE = (
    "With SCOPE_GROUP all of them MUST be in this call with the same group_size, else INVALID_ARGUMENT "
    '"samples[3].group_size".'
)


@case(
    "groups/ignored",
    Level.MUST,
    "With SCOPE_SAMPLE a server MUST NOT look at it.",
    explained_by=("score/split-merge-reorder",),
)
async def ignored(session: Session) -> None:
    """Without groups to compare, neither group_size (0, right, or wrong) nor a group_id in common changes anything."""
    if session.in_groups:
        raise NotApplicable("the server declares SCOPE_GROUP")
    samples = session.samples(min(_SEVERAL, session.info.max_samples or _SEVERAL))
    expected = await session.judge(samples)
    for size in (0, len(samples), _SEVERAL + 1):
        others = session.renamed(samples)
        for sample in others:
            sample.group_id, sample.group_size = others[0].group_id, size
        results = await session.judge(others)
        expect_alike(expected, results, f"in one group, with group_size {size}", session.last)


@case("groups/size-zero", Level.MUST, "How many samples the group has in all; 0 = 1.")
async def size_zero(session: Session) -> None:
    """A group of one may leave group_size 0."""
    _need_groups(session)
    (sample,) = session.samples(1)
    sample.group_size = 0
    await session.answered(session.request([sample]))


@case("groups/company", Level.MUST, "SCOPE_GROUP: on the other samples of its group, too.")
async def company(session: Session) -> None:
    """A group gets the same results alone and beside another group."""
    _need_groups(session)
    one, other = session.unit(), session.unit()
    if session.info.max_samples and len(one) + len(other) > session.info.max_samples:
        raise NotApplicable("the server takes one group in a call")
    alone = [*await session.judge(one), *await session.judge(other)]
    together = await session.judge(session.renamed([*one, *other]))
    expect_alike(alone, together, "a group alone and beside another", session.last)


@case("groups/part", Level.MUST, 'A part of a group = INVALID_ARGUMENT "samples[3].group_size".')
async def part(session: Session) -> None:
    """A part of a group is INVALID_ARGUMENT."""
    _need_groups(session)
    samples = session.samples(2)[:1]
    await _expect_refused(session, samples, "one sample of a group of 2")


@case("groups/sizes-differ", Level.MUST, _WHOLE)
async def sizes_differ(session: Session) -> None:
    """Samples of one group with different group_size are INVALID_ARGUMENT."""
    _need_groups(session)
    samples = session.samples(2)
    samples[1].group_size = 3
    await _expect_refused(session, samples, "a group with different group_size")


@watch(
    "groups/pending-together",
    Level.MUST,
    "If one sample of a group is PENDING, all MUST be.",
    absent="no sample of a group of several was PENDING",
)
def pending_together(exchange: Exchange) -> Iterator[str | None]:
    """A group is PENDING as a whole, where groups are compared."""
    groups: dict[str, list[bool]] = {}
    for sample, result in exchange.judgements():
        if exchange.in_groups and sample.group_size > 1:
            groups.setdefault(sample.group_id, []).append(result.HasField("pending"))
    for group_id, pending in groups.items():
        if any(pending):
            yield None if all(pending) else f"{sum(pending)} of the {len(pending)} samples of {group_id} are PENDING"


async def _expect_refused(session: Session, samples: list[reward_pb2.Sample], what: str) -> None:
    paths = tuple(f"samples[{index}].group_size" for index in range(len(samples)))
    mistake = Mistake((grpc.StatusCode.INVALID_ARGUMENT,), "INVALID_FIELD", paths)
    exchange = await session.settled(session.request(samples), mistake=mistake)
    if exchange.code not in mistake.codes:
        raise Broken(f"expected INVALID_ARGUMENT for {what}", exchange)


def _need_groups(session: Session) -> None:
    if not session.in_groups:
        raise NotApplicable("the server declares SCOPE_SAMPLE")
