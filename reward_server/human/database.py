"""The database under the queue: SQLite or PostgreSQL through the same code, one writer at a time."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiosqlite
from sqlalchemy import Connection, event, func, select, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, InterfaceError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from reward_server.human.migrations import upgrade

_DRIVERS = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+psycopg"}
_TRANSIENT = (OperationalError, InterfaceError, InternalError, PoolTimeoutError, OSError)

# Any number, as long as all replicas have the same: the key of an advisory lock.
_WRITERS_LOCK = 0x726C_6866

# A statement waits for no longer than this on others, and a replica that hangs amid its transaction loses it after.
_LOCK_SECONDS = 10
_RETRY_SECONDS = 0.02


class StoreUnavailable(Exception):  # noqa: N818 - nobody's mistake
    """The database does not answer; the same call may succeed later. Whether it was done is not known."""


class DatabaseUrlError(ValueError):
    """This is no database that the queue can live in; the message says why."""


class Database:
    """Connections to one database.

    `write` has the whole database to itself, by BEGIN IMMEDIATE or an advisory lock, so that what is read in it stays
    true until the commit. People write a few times a second at most; that rules are simple to check is worth more
    than the rest.
    """

    def __init__(self, url: str) -> None:
        self._url = _checked(url)
        self.is_sqlite = self._url.get_backend_name() == "sqlite"
        if self.is_sqlite:
            engine = create_async_engine(self._url, connect_args={"timeout": _LOCK_SECONDS})
            _set_up_sqlite(engine.sync_engine)
        else:
            try:
                engine = create_async_engine(
                    self._url, pool_pre_ping=True, connect_args={"connect_timeout": _LOCK_SECONDS}
                )
            except ModuleNotFoundError as error:
                raise DatabaseUrlError(
                    f"PostgreSQL needs the package {error.name}: pip install 'rlhf-services[postgres]'"
                ) from error
        self._engine = engine
        self._writing = engine.execution_options(immediate=True)
        # Within the process nobody has to poll for SQLite's lock, or wait for PostgreSQL's with a connection in hand.
        self._turn = asyncio.Lock()

    async def migrate(self) -> None:
        """Bring the tables up to date. Of replicas that start at once, one does it and the others wait."""
        try:
            async with self.write() as connection:
                await connection.run_sync(upgrade)
        except DatabaseError as error:
            # SQLite's for a file of another kind; what else goes wrong in a database has a class of its own.
            if type(error) is DatabaseError:
                raise DatabaseUrlError(f"{self._url.database}: {error.orig}") from error
            raise

    async def close(self) -> None:
        """Close all connections."""
        await self._engine.dispose()

    @contextlib.asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that changes nothing."""
        with _translated():
            async with self._engine.connect() as connection:
                yield connection

    @contextlib.asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncConnection]:
        """A transaction with no other writer beside it; durable when the block is left."""
        async with self._turn:
            with _translated():
                async with self._writing.begin() as connection:
                    if not self.is_sqlite:
                        await _lock_postgresql(connection)
                    yield connection


def _checked(text: str) -> URL:
    try:
        url = make_url(text)
    except ArgumentError as error:
        raise DatabaseUrlError(f"{error}; give sqlite:///file or postgresql://host/database") from error
    backend = url.get_backend_name()
    if backend not in _DRIVERS:
        raise DatabaseUrlError(f"{backend!r} is not supported; give sqlite:///file or postgresql://host/database")
    if backend == "sqlite":
        if url.database in (None, "", ":memory:"):
            raise DatabaseUrlError("ratings must outlive the process: give sqlite:///file")
        if not (folder := Path(url.database).parent).is_dir():
            raise DatabaseUrlError(f"there is no folder {folder}")
    return url.set(drivername=_DRIVERS[backend])


def _set_up_sqlite(engine: Any) -> None:
    @event.listens_for(engine, "connect")
    def connected(connection: Any, record: Any) -> None:
        # The driver would begin transactions by itself, and only at the first change.
        connection.isolation_level = None
        connection.run_async(_write_ahead)
        cursor = connection.cursor()
        # The log is synced at every commit: what a rater was told is stored outlives a power cut too, not only a kill.
        cursor.execute("PRAGMA synchronous = FULL")
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.close()

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        immediate = connection.get_execution_options().get("immediate", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")


async def _write_ahead(connection: aiosqlite.Connection) -> None:
    """Change the file to WAL, where it isn't yet.

    Of connections that change a new file at once all but one are told that it is locked, at once and whatever their
    timeout is: SQLite does not let two wait that could wait for each other.
    """
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            async with connection.execute("PRAGMA journal_mode = WAL"):
                return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
        await asyncio.sleep(_RETRY_SECONDS)


async def _lock_postgresql(connection: AsyncConnection) -> None:
    for limit in ("lock_timeout", "idle_in_transaction_session_timeout"):
        await connection.execute(select(func.set_config(text(f"'{limit}'"), text(f"'{_LOCK_SECONDS}s'"), text("true"))))
    await connection.execute(select(func.pg_advisory_xact_lock(_WRITERS_LOCK)))


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except _TRANSIENT as error:
        # SQLAlchemy's own text holds the statement and people's prompts.
        cause = getattr(error, "orig", None) or error
        raise StoreUnavailable(f"the database of ratings does not answer: {cause}") from error
