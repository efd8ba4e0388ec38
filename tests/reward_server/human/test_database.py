"""Migrations, and what a commit is worth."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import sys
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, text

from reward_server.human.database import Database, DatabaseUrlError
from reward_server.human.migrations import NewerDatabaseError
from reward_server.human.tables import metadata


async def test_the_migrations_make_the_tables_that_the_code_has(database: str) -> None:
    one = Database(database)
    await one.migrate()

    def differences(connection: Connection) -> list[object]:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        return list(compare_metadata(context, metadata))

    async with one.read() as connection:
        assert await connection.run_sync(differences) == []
    await one.close()


async def test_replicas_that_start_at_once_migrate_once(database: str) -> None:
    replicas = [Database(database) for _ in range(4)]
    await asyncio.gather(*(replica.migrate() for replica in replicas))
    async with replicas[0].read() as connection:
        assert len((await connection.execute(text("SELECT version_num FROM alembic_version"))).all()) == 1
    for replica in replicas:
        await replica.close()


async def test_a_new_file_that_another_holds_is_waited_for(tmp_path: Path) -> None:
    # SQLite itself waits for no lock when it changes a file to WAL.
    with contextlib.closing(sqlite3.connect(tmp_path / "ratings.db", isolation_level=None)) as other:
        other.execute("CREATE TABLE held (x INTEGER)")
        other.execute("BEGIN IMMEDIATE")
        one = Database(f"sqlite:///{tmp_path / 'ratings.db'}")
        migrating = asyncio.create_task(one.migrate())
        assert not (await asyncio.wait([migrating], timeout=0.3))[0]
        other.execute("COMMIT")
        await migrating
    await one.close()


async def test_a_database_of_a_later_release_is_left_alone(database: str) -> None:
    one = Database(database)
    await one.migrate()
    async with one.write() as connection:
        await connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(NewerDatabaseError, match="9999"):
        await one.migrate()
    await one.close()


async def test_a_migration_that_fails_leaves_nothing_behind(database: str) -> None:
    one = Database(database)
    async with one.write() as connection:
        await connection.execute(text("CREATE TABLE settings (something INTEGER)"))
    with pytest.raises(Exception, match="settings"):
        await one.migrate()
    async with one.write() as connection:
        await connection.execute(text("DROP TABLE settings"))
    await one.migrate()
    await one.close()


async def test_one_writer_sees_what_the_other_has_written(database: str) -> None:
    first, second = Database(database), Database(database)
    await first.migrate()
    async with first.write() as connection:
        await connection.execute(text("INSERT INTO settings VALUES ('count', '0')"))

    async def count_up(database: Database) -> None:
        for _ in range(10):
            async with database.write() as connection:
                count = await connection.scalar(text("SELECT value FROM settings WHERE key = 'count'"))
                await connection.execute(text("UPDATE settings SET value = :next"), {"next": str(int(count) + 1)})

    await asyncio.gather(*(count_up(each) for each in (first, first, second, second)))
    async with first.read() as connection:
        assert await connection.scalar(text("SELECT value FROM settings")) == "40"
    await first.close()
    await second.close()


async def test_sqlite_syncs_its_log_at_every_commit(tmp_path: Path) -> None:
    one = Database(f"sqlite:///{tmp_path}/ratings.db")
    async with one.read() as connection:
        assert await connection.scalar(text("PRAGMA journal_mode")) == "wal"
        assert await connection.scalar(text("PRAGMA synchronous")) == 2
        assert await connection.scalar(text("PRAGMA foreign_keys")) == 1
    await one.close()


def test_a_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatabaseUrlError, match=r"there is no folder .*missing"):
        Database(f"sqlite:///{tmp_path}/missing/ratings.db")


async def test_a_file_that_is_no_database_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "ratings.db"
    file.write_text("x" * 5000)
    one = Database(f"sqlite:///{file}")
    with pytest.raises(DatabaseUrlError, match=r"ratings\.db: file is not a database"):
        await one.migrate()
    assert file.read_text() == "x" * 5000
    await one.close()


def test_a_missing_driver_is_named_with_the_extra_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(DatabaseUrlError, match=r"psycopg.*rlhf-services\[postgres\]"):
        Database("postgresql://localhost/ratings")
