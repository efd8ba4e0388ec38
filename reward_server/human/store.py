"""The queue: a sample becomes a ticket, a ticket is leased to a rater, ratings and skips close it.

Nothing runs in the background: what a passed time changes (a ticket that is too old, a lease that ran out) is settled
by whoever looks at it next.
"""

from __future__ import annotations

import json
import secrets
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from sqlalchemy import and_, delete, exists, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from reward_server import metrics
from reward_server.human import raters, reports
from reward_server.human.database import Database, StoreUnavailable
from reward_server.human.rules import Rules
from reward_server.human.tables import AnyRow, judgements, leases, settings, stored, tickets
from reward_server.human.tickets import ExportRow, Overview, Pace, Queue, Rated, Rater, Ticket, TicketState
from reward_server.kinds import Sample
from reward_server.results import Abstained, Failed, FailureCode, Outcome, Pending, Scored

__all__ = ["Store", "StoreUnavailable"]

SAMPLE_ID_CLASH = Failed(FailureCode.SAMPLE_ID_CLASH, "this sample_id named other content before")

_EXPORTED_AT_ONCE = 500


class Store:
    """Tickets, leases and judgements of one version of the rules. What a method changes is one transaction.

    A rater holds at most one lease: two tabs show the same ticket. A lease that ran out stays good until somebody else
    takes the ticket. Every method may raise StoreUnavailable.
    """

    def __init__(self, database: Database, rules: Rules, now: Callable[[], float]) -> None:
        self._database = database
        self._rules = rules
        self._version = rules.version
        self._now = now

    @classmethod
    async def open(cls, url: str, rules: Rules, now: Callable[[], float] = time.time) -> Store:
        """The store at "sqlite:///file" or "postgresql://host/database", its tables brought up to date.

        Raises DatabaseUrlError, and NewerDatabaseError if a later release has been there.
        """
        database = Database(url)
        try:
            await database.migrate()
        except BaseException:
            await database.close()
            raise
        return cls(database, rules, now)

    async def close(self) -> None:
        """Close the connections."""
        await self._database.close()

    async def secret(self) -> bytes:
        """The key that signs sessions: made once, the same for all replicas and over restarts."""
        key = "session_secret"
        async with self._database.write() as connection:
            known = await connection.scalar(select(settings.c.value).where(settings.c.key == key))
            if known is None:
                known = secrets.token_hex(32)
                await connection.execute(insert(settings).values(key=key, value=known))
        return bytes.fromhex(known)

    # For trainers

    async def outcomes(self, samples: Sequence[Sample]) -> list[Outcome]:
        """What became of each sample, in order; for those that are new a ticket is made.

        A final outcome counts as delivered from here on: it will never change again.
        """
        async with self._database.write() as connection:
            now = self._now()
            await self._expire(connection, now)
            known = await self._find(connection, samples)
            missing = {_key(sample): sample for sample in samples if _key(sample) not in known}
            if missing:
                await connection.execute(insert(tickets), [self._fresh(sample, now) for sample in missing.values()])
                known |= await self._find(connection, list(missing.values()))
            rows = [known[_key(sample)] for sample in samples]
            answers = [self._outcome(row, sample, now) for row, sample in zip(rows, samples, strict=True)]
            told = {
                row.id
                for row, answer in zip(rows, answers, strict=True)
                if row.delivered_at is None and answer is not SAMPLE_ID_CLASH and not isinstance(answer, Pending)
            }
            if told:
                await connection.execute(update(tickets).where(tickets.c.id.in_(told)).values(delivered_at=now))
        return answers

    # For raters

    async def next_ticket(self, rater: Rater) -> Ticket | None:
        """The ticket that the rater holds already, else the oldest that has a place for somebody who has not judged it.

        Leases it for `lease_seconds` from now. None = nothing to rate.
        """
        async with self._database.write() as connection:
            now = self._now()
            await self._expire(connection, now)
            ticket_id = await self._held(connection, rater)
            if ticket_id is None:
                ticket_id = await self._oldest_for(connection, rater, now)
            if ticket_id is None:
                return None
            return await self._lease(connection, rater, ticket_id, now)

    async def rate(self, rater: Rater, ticket_id: int, value: float) -> Rated:
        """Store the rating of a ticket that the rater holds; posted again, it is stored once.

        Raises ValueError for a value that the scale does not have.
        """
        choice = self._rules.scale.find(value)
        if choice is None:
            raise ValueError(f"{value!r} is not on the scale")
        return await self._judge(rater, ticket_id, choice.value)

    async def skip(self, rater: Rater, ticket_id: int) -> Rated:
        """Pass a ticket that the rater holds; with enough skips it closes without a reward."""
        return await self._judge(rater, ticket_id, None)

    async def undo(self, rater: Rater) -> Ticket | None:
        """Withdraw the rater's last rating or skip and lease that ticket again; whatever else they held goes back.

        None = not possible: there is none, its outcome was answered to a trainer or does not depend on it, the ticket
        is too old, or somebody else has taken the place.
        """
        async with self._database.write() as connection:
            now = self._now()
            await self._expire(connection, now)
            last = await self._last_judged(connection, rater)
            if last is None or not await self._may_undo(connection, last, rater, now):
                return None
            await connection.execute(delete(judgements).where(_judged_by(rater, last.id)))
            await connection.execute(update(tickets).where(tickets.c.id == last.id).values(**_OPEN))
            return await self._lease(connection, rater, last.id, now)

    async def pace(self, rater: Rater) -> Pace:
        """How quickly the rater works."""
        async with self._database.read() as connection:
            paces = await reports.paces(connection, self._version, self._now(), only=[rater.id])
        return paces[rater.id].pace

    # For administrators

    async def queue(self) -> Queue:
        """What is to be rated."""
        async with self._database.write() as connection:
            now = self._now()
            await self._expire(connection, now)
            return await reports.queue(connection, self._version, now)

    async def overview(self) -> Overview:
        """The state of the queue, and who works at it."""
        queue = await self.queue()
        # The rest is counted over all that was ever rated: raters and trainers need not wait for it.
        async with self._database.read() as connection:
            return Overview(
                queue=queue,
                done=await reports.done(connection, self._version),
                raters=list((await reports.paces(connection, self._version, self._now())).values()),
                agreement=await reports.agreement(connection, self._version),
            )

    async def export(self) -> AsyncIterator[ExportRow]:
        """Every rating and skip of every version of the rules, oldest first.

        In pieces, each with a transaction of its own: a slow download holds nothing up.
        """
        last = 0
        while True:
            async with self._database.read() as connection:
                rows = (await connection.execute(reports.judgements_after(last, _EXPORTED_AT_ONCE))).all()
            for row in rows:
                yield reports.export_row(row)
            if len(rows) < _EXPORTED_AT_ONCE:
                return
            last = rows[-1].judgement_id

    # Who rates

    async def rater_by_token(self, token: str) -> Rater | None:
        """Whose token this is."""
        async with self._database.read() as connection:
            return await raters.by_token(connection, token)

    async def rater_by_session(self, rater_id: int, credential: str) -> Rater | None:
        """Who signed in earlier with the token of `credential`; None once the rater was removed or has another."""
        async with self._database.read() as connection:
            return await raters.by_session(connection, rater_id, credential)

    async def raters(self) -> list[Rater]:
        """Everybody who has a token, by name."""
        async with self._database.read() as connection:
            return await raters.all_of_them(connection)

    async def add_rater(self, name: str, *, is_admin: bool) -> str:
        """The new rater's token, which is told this once. Who was removed comes back with a new one.

        Raises ValueError for a name that is taken, or no name.
        """
        async with self._database.write() as connection:
            return await raters.add(connection, name, is_admin=is_admin)

    async def remove_rater(self, name: str) -> bool:
        """Make the rater's token void and give back what they hold; their ratings stay. False = there is none."""
        async with self._database.write() as connection:
            return await raters.remove(connection, name)

    # The rules, within a transaction

    async def _expire(self, connection: AsyncConnection, now: float) -> None:
        """Close what is too old."""
        if not self._rules.expire_seconds:
            return
        too_old = await connection.scalars(
            select(tickets.c.id).where(
                tickets.c.version == self._version,
                tickets.c.state == TicketState.OPEN,
                tickets.c.created_at <= now - self._rules.expire_seconds,
            )
        )
        for ticket_id in too_old.all():
            await self._close(connection, ticket_id, self._rules.expired(), now)

    async def _close(
        self, connection: AsyncConnection, ticket_id: int, outcome: Scored | Abstained | Failed, now: float
    ) -> None:
        await connection.execute(
            update(tickets).where(tickets.c.id == ticket_id).values(**_as_columns(outcome), closed_at=now)
        )
        await connection.execute(delete(leases).where(leases.c.ticket_id == ticket_id))

    async def _judge(self, rater: Rater, ticket_id: int, value: float | None) -> Rated:
        """value: None = a skip."""
        async with self._database.write() as connection:
            now = self._now()
            await self._expire(connection, now)
            before = (
                await connection.execute(select(judgements.c.value).where(_judged_by(rater, ticket_id)))
            ).one_or_none()
            if before is not None:
                return Rated.STORED if before.value == value else Rated.LEASE_LOST
            if await self._held(connection, rater) != ticket_id:
                return Rated.LEASE_LOST
            await connection.execute(delete(leases).where(leases.c.rater_id == rater.id))
            await connection.execute(
                insert(judgements).values(ticket_id=ticket_id, rater_id=rater.id, value=value, at=now)
            )
            outcome = self._rules.decide(*await self._judged(connection, ticket_id))
            if outcome is not None:
                await self._close(connection, ticket_id, outcome, now)
        (metrics.HUMAN_SKIPS if value is None else metrics.HUMAN_RATINGS).inc()
        return Rated.STORED

    async def _judged(
        self, connection: AsyncConnection, ticket_id: int, *, but_of: Rater | None = None
    ) -> tuple[list[float], int]:
        """The ratings and the number of skips that a ticket has."""
        query = select(judgements.c.value).where(judgements.c.ticket_id == ticket_id)
        if but_of is not None:
            query = query.where(judgements.c.rater_id != but_of.id)
        values = (await connection.scalars(query)).all()
        ratings = [value for value in values if value is not None]
        return ratings, len(values) - len(ratings)

    async def _held(self, connection: AsyncConnection, rater: Rater) -> int | None:
        """The ticket that the rater holds a lease of, if it is one of this version."""
        ticket_id: int | None = await connection.scalar(
            select(leases.c.ticket_id)
            .join(tickets)
            .where(leases.c.rater_id == rater.id, tickets.c.version == self._version)
        )
        return ticket_id

    async def _oldest_for(self, connection: AsyncConnection, rater: Rater, now: float) -> int | None:
        judged = exists().where(judgements.c.ticket_id == tickets.c.id, judgements.c.rater_id == rater.id)
        ticket_id: int | None = await connection.scalar(
            select(tickets.c.id)
            .where(
                tickets.c.version == self._version,
                tickets.c.state == TicketState.OPEN,
                ~judged,
                _ratings_of_ticket() + _running_leases(now) < self._rules.ratings_per_sample,
            )
            .order_by(tickets.c.created_at, tickets.c.id)
            .limit(1)
        )
        return ticket_id

    async def _lease(self, connection: AsyncConnection, rater: Rater, ticket_id: int, now: float) -> Ticket:
        """Give the rater a place that was found free. Leases that have run out end here, so that they never add up."""
        run_out = await connection.execute(
            delete(leases).where(leases.c.ticket_id == ticket_id, leases.c.until <= now, leases.c.rater_id != rater.id)
        )
        metrics.HUMAN_LEASES_EXPIRED.inc(run_out.rowcount)
        await connection.execute(delete(leases).where(leases.c.rater_id == rater.id))
        until = now + self._rules.lease_seconds
        await connection.execute(insert(leases).values(rater_id=rater.id, ticket_id=ticket_id, until=until))
        row = (
            await connection.execute(
                select(tickets, _ratings_of_ticket().label("ratings")).where(tickets.c.id == ticket_id)
            )
        ).one()
        return Ticket(
            id=row.id,
            run_id=row.run_id,
            sample_id=row.sample_id,
            prompt=row.prompt,
            completion=row.completion,
            messages_json=row.messages_json,
            created_at=row.created_at,
            ratings=row.ratings,
            wanted=self._rules.ratings_per_sample,
            lease_until=until,
        )

    async def _last_judged(self, connection: AsyncConnection, rater: Rater) -> AnyRow | None:
        return (
            await connection.execute(
                select(tickets.c.id, tickets.c.created_at, tickets.c.delivered_at)
                .join(judgements)
                .where(judgements.c.rater_id == rater.id, tickets.c.version == self._version)
                .order_by(judgements.c.id.desc())
                .limit(1)
            )
        ).one_or_none()

    async def _may_undo(self, connection: AsyncConnection, ticket: AnyRow, rater: Rater, now: float) -> bool:
        if ticket.delivered_at is not None or self._rules.has_expired(ticket.created_at, now):
            return False
        ratings, skips = await self._judged(connection, ticket.id, but_of=rater)
        if self._rules.decide(ratings, skips) is not None:
            return False
        running = await connection.scalar(
            select(_running_leases(now)).select_from(tickets).where(tickets.c.id == ticket.id)
        )
        return len(ratings) + int(running or 0) < self._rules.ratings_per_sample

    async def _find(self, connection: AsyncConnection, samples: Sequence[Sample]) -> dict[tuple[str, str], AnyRow]:
        """The tickets of those samples that have one."""
        ids: dict[str, list[str]] = defaultdict(list)
        for run_id, sample_id in map(_key, samples):
            ids[run_id].append(sample_id)
        found: dict[tuple[str, str], AnyRow] = {}
        for run_id, sample_ids in ids.items():
            rows = await connection.execute(
                select(tickets).where(
                    tickets.c.version == self._version,
                    tickets.c.run_id == run_id,
                    tickets.c.sample_id.in_(sample_ids),
                )
            )
            found.update(((row.run_id, row.sample_id), row) for row in rows)
        return found

    def _fresh(self, sample: Sample, now: float) -> dict[str, object]:
        return {
            "version": self._version,
            "run_id": sample.key.run_id,
            "sample_id": sample.key.sample_id,
            "fingerprint": sample.fingerprint,
            "prompt": sample.prompt,
            "completion": sample.completion,
            "messages_json": json.dumps([dict(message) for message in sample.messages]),
            "created_at": now,
            **_OPEN,
        }

    def _outcome(self, row: AnyRow, sample: Sample, now: float) -> Outcome:
        if row.fingerprint != sample.fingerprint:
            return SAMPLE_ID_CLASH
        if row.state == TicketState.OPEN:
            return Pending(self._rules.retry_after)
        settles_in = row.closed_at + self._rules.undo_seconds - now
        if settles_in > 0 and row.delivered_at is None:
            return Pending(min(settles_in, self._rules.retry_after))
        match TicketState(row.state):
            case TicketState.SCORED:
                return Scored(row.reward, json.loads(row.components_json))
            case TicketState.ABSTAINED:
                return Abstained(row.reason)
            case TicketState.FAILED:
                return Failed(row.failure_code, row.reason)
        raise AssertionError(f"ticket {row.id} is {row.state}")


_OPEN: dict[str, object] = {
    "state": TicketState.OPEN,
    "reward": None,
    "components_json": "{}",
    "failure_code": "",
    "reason": "",
    "closed_at": None,
}


def _as_columns(outcome: Scored | Abstained | Failed) -> dict[str, object]:
    match outcome:
        case Scored():
            return {
                "state": TicketState.SCORED,
                "reward": outcome.reward,
                "components_json": json.dumps(dict(outcome.components)),
            }
        case Abstained():
            return {"state": TicketState.ABSTAINED, "reason": outcome.reason}
        case Failed():
            return {"state": TicketState.FAILED, "failure_code": outcome.code, "reason": outcome.message}


def _key(sample: Sample) -> tuple[str, str]:
    """A sample's name as its ticket has it."""
    return stored(sample.key.run_id), stored(sample.key.sample_id)


def _judged_by(rater: Rater, ticket_id: int) -> Any:
    return and_(judgements.c.ticket_id == ticket_id, judgements.c.rater_id == rater.id)


def _ratings_of_ticket() -> Any:
    return (
        select(func.count())
        .where(judgements.c.ticket_id == tickets.c.id, judgements.c.value.is_not(None))
        .correlate(tickets)
        .scalar_subquery()
    )


def _running_leases(now: float) -> Any:
    return (
        select(func.count())
        .where(leases.c.ticket_id == tickets.c.id, leases.c.until > now)
        .correlate(tickets)
        .scalar_subquery()
    )
