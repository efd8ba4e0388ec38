"""`kill -9` under load: people rate on the real page, trainers ask over gRPC, and the server dies again and again.

On SQLite there is one server, on PostgreSQL there are two that share the database and are killed in turn.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from sqlalchemy import text

from reward_server.human.database import Database
from reward_server.human.options import HumanOptions
from reward_server.human.store import Store
from reward_server.results import Scored
from rlhf.channel import open_channel
from rlhf.reward.v1 import reward_pb2, reward_pb2_grpc
from tests.reward_server.conftest import request, sample
from tests.support.processes import ProcessUnderTest, StartProcess

SERVICE = "rlhf.reward.v1.RewardService"
WANTED = 2
RATERS = 4
TRAINERS = 2
OPEN_SAMPLES = 12
OPTIONS = {"ratings_per_sample": WANTED, "skips_to_abstain": 2, "undo_seconds": 0.05, "retry_after": 0.1}

_CSRF = re.compile(r'name="csrf" value="([^"]+)"')
_TICKET = re.compile(r"/tickets/(\d+)/rating")

Judgement = tuple[int, str, float | None]
"""Ticket, rater, and value; None = a skip."""


@dataclass
class Seen:
    """What everybody has seen from the outside, and so what must be true of the database."""

    asked: set[tuple[str, str]] = field(default_factory=set)
    final: dict[tuple[str, str], bytes] = field(default_factory=dict)
    posted: set[Judgement] = field(default_factory=set)
    acknowledged: set[Judgement] = field(default_factory=set)
    shown: dict[int, set[str]] = field(default_factory=lambda: defaultdict(set))

    def show(self, ticket: int, rater: str) -> None:
        """A page shows it: no more people may have it, or have rated it, than it wants."""
        self.shown[ticket].add(rater)
        skipped = {who for of, who, value in self.posted if of == ticket and value is None}
        assert len(self.shown[ticket] - skipped) <= WANTED, f"ticket {ticket} was shown to {self.shown[ticket]}"

    def answer(self, run: str, result: reward_pb2.SampleResult) -> bool:
        """A trainer was told this; whether it is final."""
        if result.WhichOneof("outcome") == "pending":
            return False
        told = result.SerializeToString(deterministic=True)
        assert self.final.setdefault((run, result.sample_id), told) == told, "a final outcome has changed"
        return True


class Replica:
    """A server that can be killed and started again; where its page is after that is in a file."""

    def __init__(self, start: StartProcess, database: str, page_file: Path) -> None:
        options = {**OPTIONS, "database": database, "listen": "127.0.0.1:0", "endpoint_file": str(page_file)}
        flags = ("--reward", "human", "--reward-options", json.dumps(options), "--drain-seconds", "0")
        self._begin: Callable[[], ProcessUnderTest] = lambda: start("reward_server", *flags)
        self._page_file = page_file
        self.process: ProcessUnderTest | None = None

    def start(self) -> None:
        self.process = self._begin()

    def wait(self) -> None:
        assert self.process is not None
        self.process.wait_serving(SERVICE)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()

    @property
    def page(self) -> str:
        return str(json.loads(self._page_file.read_text())["address"])

    @property
    def address(self) -> str:
        assert self.process is not None
        return self.process.address


class Load:
    """People and trainers who go on until they are told to stop."""

    def __init__(self, replicas: list[Replica], seen: Seen, tokens: Mapping[str, str]) -> None:
        self._replicas = replicas
        self._seen = seen
        self._tokens = tokens
        self._stopping = False

    async def __aenter__(self) -> Load:
        self._trainers = [asyncio.create_task(self._train(f"run {number}")) for number in range(TRAINERS)]
        self._people = [asyncio.create_task(self._rate(name)) for name in self._tokens]
        return self

    async def __aexit__(self, *_: object) -> None:
        """Until every sample that was asked for has its outcome."""
        self._stopping = True
        try:
            async with asyncio.timeout(120):
                await asyncio.gather(*self._trainers)
        finally:
            for task in (*self._people, *self._trainers):
                task.cancel()
            await asyncio.gather(*self._people, *self._trainers, return_exceptions=True)
        self.check()

    def check(self) -> None:
        """Raise what a client has found wrong."""
        for task in (*self._people, *self._trainers):
            if task.done() and not task.cancelled():
                task.result()

    async def _train(self, run: str) -> None:
        """Ask for a few samples at a time until each has its outcome, and now and then for one that has."""
        chance = random.Random(run)
        waiting: dict[str, reward_pb2.Sample] = {}
        done: list[reward_pb2.Sample] = []
        count = 0
        while waiting or not self._stopping:
            while not self._stopping and len(waiting) < OPEN_SAMPLES:
                count += 1
                waiting[f"s{count}"] = sample(f"s{count}", completion=f"completion {count}")
            batch = [*waiting.values(), *chance.sample(done, min(2, len(done)))]
            response = await self._score(chance.choice(self._replicas), run, batch)
            for result in response.results if response else ():
                self._seen.asked.add((run, result.sample_id))
                if self._seen.answer(run, result) and result.sample_id in waiting:
                    done.append(waiting.pop(result.sample_id))
            await asyncio.sleep(0.02)

    async def _score(
        self, replica: Replica, run: str, batch: list[reward_pb2.Sample]
    ) -> reward_pb2.ScoreResponse | None:
        with suppress(grpc.aio.AioRpcError, OSError):
            async with open_channel(replica.address) as channel:
                stub: Any = reward_pb2_grpc.RewardServiceStub(channel)  # type: ignore[no-untyped-call]
                answer: reward_pb2.ScoreResponse = await stub.Score(request(*batch, run_id=run), timeout=5)
                return answer
        return None

    async def _rate(self, name: str) -> None:
        """Sign in once, then rate whatever the page shows, at whichever server answers."""
        chance = random.Random(name)
        async with httpx.AsyncClient(timeout=5) as browser:
            while True:
                with suppress(httpx.TransportError, OSError, ValueError):
                    await self._rate_one(browser, chance.choice(self._replicas).page, name, chance)
                await asyncio.sleep(0.01)

    async def _rate_one(self, browser: httpx.AsyncClient, page: str, name: str, chance: random.Random) -> None:
        shown = await browser.get(page)
        if shown.has_redirect_location:
            sign_in = await browser.get(f"{page}/sign-in")
            await browser.post(f"{page}/sign-in", data={"csrf": _found(_CSRF, sign_in), "token": self._tokens[name]})
            return
        if shown.status_code != 200 or not _TICKET.search(shown.text):
            return
        ticket = int(_found(_TICKET, shown))
        self._seen.show(ticket, name)
        value = None if chance.random() < 0.1 else float(chance.randint(1, 5))
        judgement = (ticket, name, value)
        self._seen.posted.add(judgement)
        way = f"{page}/tickets/{ticket}/" + ("skip" if value is None else "rating")
        answer = await browser.post(way, data={"csrf": _found(_CSRF, shown), "value": str(value)})
        if answer.status_code == 303:
            self._seen.acknowledged.add(judgement)


def _found(pattern: re.Pattern[str], page: httpx.Response) -> str:
    match = pattern.search(page.text)
    if match is None:
        raise ValueError(f"{page.status_code}: {page.text}")
    return match[1]


@pytest.mark.parametrize(
    "kills",
    [4, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])],
)
async def test_killing_the_server_loses_no_ticket_and_no_rating_and_doubles_none(
    database: str, kills: int, tmp_path: Path, start_process: StartProcess
) -> None:
    tokens = await _add_raters(database)
    replicas = [
        Replica(start_process, database, tmp_path / f"page-{number}.json")
        for number in range(1 if database.startswith("sqlite") else 2)
    ]
    for replica in replicas:
        replica.start()
    for replica in replicas:
        await asyncio.to_thread(replica.wait)
    seen = Seen()
    chance = random.Random(kills)
    async with Load(replicas, seen, tokens) as load:
        for number in range(kills):
            rated = len(seen.acknowledged)
            await _until(lambda rated=rated: len(seen.acknowledged) >= rated + chance.randint(3, 12), load)  # type: ignore[misc]
            replica = replicas[number % len(replicas)]
            await asyncio.to_thread(replica.kill)
            replica.start()
            await asyncio.to_thread(replica.wait)
    assert seen.asked == seen.final.keys()
    await _check(database, seen)


async def _until(condition: Callable[[], bool], load: Load) -> None:
    async with asyncio.timeout(60):
        while not condition():
            load.check()
            await asyncio.sleep(0.005)


async def _add_raters(database: str) -> dict[str, str]:
    store = await Store.open(database, HumanOptions.model_validate(OPTIONS).rules())
    names = [f"rater {number}" for number in range(RATERS)]
    tokens = {name: await store.add_rater(name, is_admin=False) for name in names}
    await store.close()
    return tokens


async def _check(database: str, seen: Seen) -> None:
    """The database against all that was seen."""
    connections = Database(database)
    async with connections.read() as connection:
        tickets = (await connection.execute(text("SELECT id, run_id, sample_id, state, reward FROM tickets"))).all()
        judgements = (
            await connection.execute(
                text("SELECT ticket_id, name, value FROM judgements JOIN raters ON raters.id = rater_id")
            )
        ).all()
    await connections.close()

    stored = [(row.ticket_id, row.name, row.value) for row in judgements]
    assert len({(ticket, name) for ticket, name, _ in stored}) == len(stored), "somebody has judged a ticket twice"
    assert seen.acknowledged <= set(stored), "an acknowledged rating is lost"
    assert set(stored) <= seen.posted, "a rating that nobody gave"
    assert seen.asked <= {(row.run_id, row.sample_id) for row in tickets}, "a ticket is lost"

    rules = HumanOptions.model_validate(OPTIONS).rules()
    for row in tickets:
        values = [value for ticket, _, value in stored if ticket == row.id]
        ratings = [value for value in values if value is not None]
        assert len(ratings) <= WANTED
        told = seen.final.get((row.run_id, row.sample_id))
        if told is not None:
            result = reward_pb2.SampleResult.FromString(told)
            outcome = rules.decide(ratings, len(values) - len(ratings))
            assert result.WhichOneof("outcome") == row.state
            if isinstance(outcome, Scored):
                assert result.scored.reward == outcome.reward == row.reward
