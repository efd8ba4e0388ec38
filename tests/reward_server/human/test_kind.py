"""The kind as the reward server uses it, and as a process."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from prometheus_client import REGISTRY
from pydantic import ValidationError
from sqlalchemy import text

from reward_server.human.database import Database
from reward_server.human.kind import HumanOptions, HumanReward
from reward_server.human.rules import Rules, Scale
from reward_server.human.store import Store
from reward_server.human.tickets import Queue
from reward_server.kinds import Limits, RewardLoadError
from reward_server.results import Pending, Scored
from rlhf.failures import RpcFailure
from rlhf.reward.v1 import reward_pb2, reward_pb2_grpc
from rlhf.server import BindError
from tests.reward_server.conftest import request, sample, until
from tests.reward_server.human.conftest import make_sample, rater_of
from tests.support.postgres import PostgresServer
from tests.support.processes import StartProcess

OpenKind = Callable[..., Awaitable[HumanReward]]


def page_of(file: Path) -> str:
    return str(json.loads(file.read_text())["address"])


@pytest.fixture
async def open_kind(tmp_path: Path) -> AsyncIterator[OpenKind]:
    """`kind = await open_kind(question="…")`, started, on a database in the test's folder."""
    async with AsyncExitStack() as stack:

        async def open_one(**options: Any) -> HumanReward:
            options.setdefault("database", f"sqlite:///{tmp_path}/ratings.db")
            options.setdefault("listen", "127.0.0.1:0")
            options.setdefault("endpoint_file", tmp_path / "page.json")
            kind = HumanReward(HumanOptions(**options), Limits())
            stack.push_async_callback(kind.close)
            await kind.start()
            return kind

        yield open_one


async def test_it_answers_pending_until_a_person_has_rated(open_kind: OpenKind, tmp_path: Path) -> None:
    kind = await open_kind(undo_seconds=0, retry_after=3)
    assert await kind.score([make_sample("a")], None) == [Pending(3.0)]
    store = await Store.open(f"sqlite:///{tmp_path}/ratings.db", HumanOptions().rules())
    ada = await rater_of(store, "Ada")
    ticket = await store.next_ticket(ada)
    assert ticket is not None
    await store.rate(ada, ticket.id, 1)
    await store.close()
    (outcome,) = await kind.score([make_sample("a")], None)
    assert isinstance(outcome, Scored)
    assert outcome.reward == -1.0


async def test_it_serves_the_page_until_it_is_closed(open_kind: OpenKind, tmp_path: Path) -> None:
    kind = await open_kind(title="Film reviews")
    page = page_of(tmp_path / "page.json")
    async with httpx.AsyncClient() as browser:
        assert (await browser.get(f"{page}/healthz")).status_code == 200
        shown = await browser.get(f"{page}/sign-in")
        assert "Film reviews" in shown.text
        assert "uvicorn" not in str(shown.headers)
        await kind.close()
        assert not (tmp_path / "page.json").exists()
        with pytest.raises(httpx.ConnectError):
            await browser.get(f"{page}/healthz")


async def test_its_page_leaves_signals_to_the_reward_server(open_kind: OpenKind) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    await open_kind()
    await asyncio.sleep(0)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


async def test_a_page_whose_port_is_taken_is_named(open_kind: OpenKind) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(BindError, match=address):
            await open_kind(listen=address)


async def test_closing_lets_the_query_that_counts_the_queue_end(
    open_kind: OpenKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting, go_on, counted = asyncio.Event(), asyncio.Event(), asyncio.Event()
    count = Store.queue

    async def slow(store: Store) -> Queue:
        counting.set()
        await go_on.wait()
        queue = await count(store)
        counted.set()
        return queue

    monkeypatch.setattr(Store, "queue", slow)
    kind = await open_kind()
    async with asyncio.timeout(10):
        await counting.wait()
        closing = asyncio.create_task(kind.close())
        go_on.set()
        await closing
    assert counted.is_set()


async def test_a_database_that_waiting_does_not_mend_ends_the_start(open_kind: OpenKind, tmp_path: Path) -> None:
    with pytest.raises(RewardLoadError, match="there is no folder"):
        await open_kind(database=f"sqlite:///{tmp_path}/missing/ratings.db")
    kind = await open_kind()
    await kind.close()
    database = Database(f"sqlite:///{tmp_path}/ratings.db")
    async with database.write() as connection:
        await connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    await database.close()
    with pytest.raises(RewardLoadError, match="9999"):
        await open_kind()


async def test_the_start_waits_for_a_database_and_calls_are_unavailable_without_it(
    open_kind: OpenKind, postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reward_server.human.kind._CONNECT_PAUSE_SECONDS", 0.05)
    url = postgres.new_database()
    await asyncio.to_thread(postgres.stop)
    try:
        starting = asyncio.create_task(open_kind(database=url))
        await asyncio.wait([starting], timeout=0.5)
        assert not starting.done()
    finally:
        await asyncio.to_thread(postgres.start)
    kind = await starting
    await asyncio.to_thread(postgres.stop)
    try:
        with pytest.raises(RpcFailure) as refused:
            await kind.score([make_sample("a")], None)
        assert refused.value.code is grpc.StatusCode.UNAVAILABLE
        assert refused.value.retry_after == 5.0
    finally:
        await asyncio.to_thread(postgres.start)
    assert await kind.score([make_sample("a")], None) == [Pending(5.0)]


async def test_its_metrics_tell_of_the_queue_and_of_the_work(
    open_kind: OpenKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reward_server.human.kind._OBSERVE_SECONDS", 0.01)

    def count(name: str) -> float:
        return REGISTRY.get_sample_value(f"rlhf_reward_human_{name}_total") or 0.0

    def tickets(state: str) -> float | None:
        return REGISTRY.get_sample_value("rlhf_reward_human_tickets", {"state": state})

    before = {name: count(name) for name in ("ratings", "skips", "leases_expired")}
    kind = await open_kind(lease_seconds=0.001)
    await kind.score([make_sample(name) for name in "abc"], None)
    await until(lambda: (tickets("waiting"), tickets("leased")) == (3, 0))
    assert (REGISTRY.get_sample_value("rlhf_reward_human_oldest_ticket_seconds") or 0) > 0
    store = await Store.open(f"sqlite:///{tmp_path}/ratings.db", replace(HumanOptions().rules(), lease_seconds=60.0))
    ada, bob = await rater_of(store, "Ada"), await rater_of(store, "Bob")
    held = await kind._store.next_ticket(ada)
    await asyncio.sleep(0.002)
    taken = await store.next_ticket(bob)
    assert held is not None
    assert taken is not None
    assert taken.id == held.id
    await until(lambda: (tickets("waiting"), tickets("leased")) == (2, 1))
    await store.rate(bob, taken.id, 4)
    other = await store.next_ticket(bob)
    assert other is not None
    await store.skip(bob, other.id)
    await store.close()
    assert {name: count(name) - before[name] for name in before} == {"ratings": 1, "skips": 1, "leases_expired": 1}
    await until(lambda: (tickets("waiting"), tickets("leased")) == (1, 0))


def test_the_default_options_are_the_default_rules_with_time_for_an_undo() -> None:
    assert HumanOptions().rules() == Rules(question="How good is this completion?", undo_seconds=10.0)


def test_its_version_says_what_decides_about_rewards() -> None:
    kind = HumanReward(HumanOptions(question="Is it kind?"), Limits())
    assert kind.description.name == "human"
    assert kind.description.version == HumanOptions(question="Is it kind?").rules().version
    assert kind.description.version != HumanReward(HumanOptions(), Limits()).description.version


@pytest.mark.parametrize(
    ("scale", "made"),
    [
        ({}, Scale.of_steps(1, 5)),
        ({"min": 0, "max": 1, "step": 0.25}, Scale.of_steps(0, 1, 0.25)),
        ({"labels": {"good": 1, "bad": 0}}, Scale.of_labels({"bad": 0, "good": 1})),
    ],
)
def test_a_scale_is_steps_or_names(scale: dict[str, Any], made: Scale) -> None:
    assert HumanOptions.model_validate({"scale": scale}).rules().scale == made


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"scale": {"labels": {"a": 0, "b": 1}, "max": 3}}, "either labels or min"),
        ({"scale": {"min": 5, "max": 1}}, "min up to max"),
        ({"scale": {"labels": {"only": 1}}}, "from 2"),
        ({"reward_range": [1, -1]}, "higher is better"),
        ({"reward_range": [0, float("inf")]}, "finite"),
        ({"listen": "8080"}, "listen"),
        ({"listen": "0.0.0.0:8080"}, "0.0.0.0:8080, which other machines can reach.*secure_cookies"),
        ({"listen": "ratings.example:8080", "trusted_proxies": ["10.0.0.1"]}, "which other machines can reach"),
        ({"aggregate": "max"}, "mean"),
        ({"questions": "?"}, "questions"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        HumanOptions.model_validate(options)


@pytest.mark.parametrize(
    "options",
    [
        {"listen": "[::1]:8080"},
        {"listen": "0.0.0.0:8080", "secure_cookies": True},
        {"listen": "0.0.0.0:8080", "insecure": True},
    ],
)
def test_the_page_is_out_of_reach_or_behind_https_or_says_not(options: dict[str, Any]) -> None:
    HumanOptions.model_validate(options)


async def test_a_process_serves_trainers_and_raters_and_stops_cleanly(
    tmp_path: Path, start_process: StartProcess
) -> None:
    database, page_file = f"sqlite:///{tmp_path}/ratings.db", tmp_path / "page.json"
    store = await Store.open(database, HumanOptions().rules())
    token = await store.add_rater("Ada", is_admin=False)
    options = {"database": database, "listen": "127.0.0.1:0", "endpoint_file": str(page_file), "undo_seconds": 0}
    server = start_process("reward_server", "--reward", "human", "--reward-options", json.dumps(options))
    await asyncio.to_thread(server.wait_serving, "rlhf.reward.v1.RewardService")
    async with grpc.aio.insecure_channel(server.address) as channel, httpx.AsyncClient(timeout=30) as browser:
        stub: Any = reward_pb2_grpc.RewardServiceStub(channel)  # type: ignore[no-untyped-call]
        info = await stub.GetRewardInfo(reward_pb2.GetRewardInfoRequest(), timeout=30)
        assert info.name == "human"
        assert info.remembers.seconds == 10 * 365 * 86400
        (result,) = (await stub.Score(request(sample("a")), timeout=30)).results
        assert result.pending.retry_after.seconds == 5
        ada = await store.rater_by_token(token)
        assert ada is not None
        ticket = await store.next_ticket(ada)
        assert ticket is not None
        assert (await browser.get(f"{page_of(page_file)}/healthz")).status_code == 200
        await store.rate(ada, ticket.id, 5)
        (result,) = (await stub.Score(request(sample("a")), timeout=30)).results
        assert result.scored.reward == 1.0
        assert result.scored.components["rating"] == 5.0
    await store.close()
    assert await asyncio.to_thread(server.terminate) == 0
    assert "Traceback" not in server.log_text()
