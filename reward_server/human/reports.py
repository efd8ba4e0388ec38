"""What administrators and raters are told of the work, within a transaction of the store."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Select, and_, exists, func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from reward_server.human.agreement import krippendorff_alpha
from reward_server.human.tables import AnyRow, judgements, leases, raters, tickets
from reward_server.human.tickets import ExportRow, Pace, Queue, RaterPace, TicketState

_HOUR = 3600.0
_DAY = 86400.0


async def queue(connection: AsyncConnection, version: str, now: float) -> Queue:
    """See Store.queue; what is too old is closed already."""
    is_leased = exists().where(leases.c.ticket_id == tickets.c.id, leases.c.until > now)
    query = select(
        func.count().label("open"),
        func.count().filter(is_leased).label("leased"),
        func.min(tickets.c.created_at).label("oldest"),
    ).where(tickets.c.version == version, tickets.c.state == TicketState.OPEN)
    found = (await connection.execute(query)).one()
    return Queue(
        waiting=found.open - found.leased,
        leased=found.leased,
        oldest_age_seconds=None if found.oldest is None else max(0.0, now - found.oldest),
    )


async def done(connection: AsyncConnection, version: str) -> int:
    """How many tickets have ended."""
    query = select(func.count()).where(tickets.c.version == version, tickets.c.state != TicketState.OPEN)
    return (await connection.execute(query)).scalar_one()


async def agreement(connection: AsyncConnection, version: str) -> float | None:
    """Krippendorff's alpha of all ratings, from pairs that the database counts: there are many, of few values."""
    shared = (
        select(judgements.c.ticket_id, func.count().label("ratings"))
        .join(tickets)
        .where(tickets.c.version == version, judgements.c.value.is_not(None))
        .group_by(judgements.c.ticket_id)
        .having(func.count() > 1)
        .subquery()
    )
    one, other = judgements.alias(), judgements.alias()
    pairs = (
        select(one.c.value, other.c.value.label("other"), shared.c.ratings, func.count().label("times"))
        .join_from(shared, one, one.c.ticket_id == shared.c.ticket_id)
        .join(other, and_(other.c.ticket_id == one.c.ticket_id, other.c.id != one.c.id))
        .where(one.c.value.is_not(None), other.c.value.is_not(None))
        .group_by(one.c.value, other.c.value, shared.c.ratings)
    )
    coincidences: dict[tuple[float, float], float] = defaultdict(float)
    for row in await connection.execute(pairs):
        coincidences[row.value, row.other] += row.times / (row.ratings - 1)
    return krippendorff_alpha(coincidences)


async def paces(
    connection: AsyncConnection, version: str, now: float, only: Collection[int] | None = None
) -> dict[int, RaterPace]:
    """By rater, ordered by name: `only` these, or all who have a token."""
    # Without a ticket of this version a judgement counts nowhere.
    rated = and_(tickets.c.id.is_not(None), judgements.c.value.is_not(None))
    query = (
        select(
            raters.c.id,
            raters.c.name,
            func.count().filter(rated).label("total"),
            func.count().filter(and_(rated, judgements.c.at >= now - now % _DAY)).label("today"),
            func.count().filter(and_(rated, judgements.c.at > now - _HOUR)).label("hour"),
            func.count(tickets.c.id).label("judged"),
        )
        .join_from(raters, judgements, isouter=True)
        .join(tickets, and_(tickets.c.id == judgements.c.ticket_id, tickets.c.version == version), isouter=True)
        .where(raters.c.token_digest.is_not(None) if only is None else raters.c.id.in_(only))
        .group_by(raters.c.id, raters.c.name)
        .order_by(raters.c.name)
    )
    return {
        row.id: RaterPace(row.name, Pace(row.today, row.total, float(row.hour)), row.judged - row.total)
        for row in await connection.execute(query)
    }


def judgements_after(judgement_id: int, limit: int) -> Select[Any]:
    """The next rows to export, each with the `judgement_id` to go on from."""
    return (
        select(judgements.c.id.label("judgement_id"), judgements.c.value, judgements.c.at, tickets, raters.c.name)
        .join_from(judgements, tickets)
        .join(raters)
        .where(judgements.c.id > judgement_id)
        .order_by(judgements.c.id)
        .limit(limit)
    )


def export_row(row: AnyRow) -> ExportRow:
    """One of those rows as it is told."""
    return ExportRow(
        version=row.version,
        run_id=row.run_id,
        sample_id=row.sample_id,
        prompt=row.prompt,
        completion=row.completion,
        messages_json=row.messages_json,
        rater=row.name,
        value=row.value,
        rated_at=datetime.fromtimestamp(row.at, tz=UTC).isoformat(timespec="milliseconds"),
        outcome=row.state,
        reward=row.reward,
        reason=row.reason,
    )
