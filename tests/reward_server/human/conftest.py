from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from reward_server.human.rules import Rules
from reward_server.human.store import Store
from reward_server.human.tickets import Rater
from reward_server.kinds import Sample
from reward_server.memory import SampleKey
from tests.support.postgres import PostgresServer, postgres_server

OpenStore = Callable[..., Awaitable[Store]]


@dataclass
class Clock:
    """A clock that moves when it is told to."""

    time: float = 1_000_000.0

    def __call__(self) -> float:
        return self.time

    def pass_by(self, seconds: float) -> None:
        self.time += seconds


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    with postgres_server() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database; what uses it runs on both kinds."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/ratings.db"
    server: PostgresServer = request.getfixturevalue("postgres")
    return server.new_database()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def open_store(database: str, clock: Clock) -> AsyncIterator[OpenStore]:
    """`store = await open_store(ratings_per_sample=2)`: on the test's database and clock."""
    async with AsyncExitStack() as stack:

        async def open_one(**rules: Any) -> Store:
            store = await Store.open(database, Rules(**rules), now=clock)
            stack.push_async_callback(store.close)
            return store

        yield open_one


def make_sample(sample_id: str, completion: str = "Paris.", *, run_id: str = "run", **fields: Any) -> Sample:
    fields.setdefault("prompt", "What is the capital of France?")
    fields.setdefault("fingerprint", completion.encode())
    return Sample(completion=completion, key=SampleKey(run_id, sample_id), **fields)


async def rater_of(store: Store, name: str, *, is_admin: bool = False) -> Rater:
    rater = await store.rater_by_token(await store.add_rater(name, is_admin=is_admin))
    assert rater is not None
    return rater
