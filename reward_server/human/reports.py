"""What administrators and raters are told of the work, within a transaction of the store."""

from __future__ import annotations

from collections.abc import Collection
from datetime import UTC, datetime
from itertools import groupby
from operator import attrgetter
from typing import Any

from sqlalchemy import Select, and_, exists, func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from reward_server.human.agreement import krippendorff_alpha
from reward_server.human.tables import AnyRow, judgements, leases, raters, tickets
from reward_server.human.tickets import ExportRow, Overview, Pace, RaterPace, TicketState

_HOUR = 3600.0
_DAY = 86400.0


async def overview(connection: AsyncConnection, version: str, now: float) -> Overview:
    """See Store.overview; what is too old is closed already."""
    is_open = tickets.c.state == TicketState.OPEN
    is_leased = exists().where(leases.c.ticket_id == tickets.c.id, leases.c.until > now)
    query = select(
        func.count().filter(and_(is_open, ~is_leased)).label("waiting"),
        func.count().filter(and_(is_open, is_leased)).label("leased"),
        func.count().filter(~is_open).label("done"),
        func.min(tickets.c.created_at).filter(is_open).label("oldest"),
    ).where(tickets.c.version == version)
    counts = (await connection.execute(query)).one()
    return Overview(
        waiting=counts.waiting,
        leased=counts.leased,
        done=counts.done,
        oldest_age_seconds=None if counts.oldest is None else max(0.0, now - counts.oldest),
        raters=list((await paces(connection, version, now)).values()),
        agreement=krippendorff_alpha(await _ratings_by_ticket(connection, version)),
    )


async def _ratings_by_ticket(connection: AsyncConnection, version: str) -> list[list[float]]:
    rows = await connection.execute(
        select(judgements.c.ticket_id, judgements.c.value)
        .join(tickets)
        .where(tickets.c.version == version, judgements.c.value.is_not(None))
        .order_by(judgements.c.ticket_id)
    )
    return [[row.value for row in unit] for _, unit in groupby(rows, attrgetter("ticket_id"))]


async def paces(
    connection: AsyncConnection, version: str, now: float, only: Collection[int] | None = None
) -> dict[int, RaterPace]:
    """By rater, ordered by name: `only` these, or all who have a token."""
    judged = (
        select(judgements.c.rater_id, judgements.c.value, judgements.c.at)
        .join(tickets)
        .where(tickets.c.version == version)
        .subquery()
    )
    rated = judged.c.value.is_not(None)
    query = (
        select(
            raters.c.id,
            raters.c.name,
            func.count().filter(rated).label("total"),
            func.count().filter(and_(rated, judged.c.at >= now - now % _DAY)).label("today"),
            func.count().filter(and_(rated, judged.c.at > now - _HOUR)).label("hour"),
            func.count(judged.c.rater_id).label("judged"),
        )
        .join_from(raters, judged, judged.c.rater_id == raters.c.id, isouter=True)
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
