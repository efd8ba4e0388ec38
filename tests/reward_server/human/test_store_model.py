"""The store against a model of it that keeps everything in dictionaries: any order of calls, any passing of time."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Awaitable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from reward_server.human.agreement import krippendorff_alpha
from reward_server.human.rules import OnExpiry, Rules
from reward_server.human.store import Store
from reward_server.human.tickets import Rated, Rater
from reward_server.kinds import Sample
from reward_server.results import Failed, Outcome, Pending
from tests.reward_server.human.conftest import Clock, make_sample
from tests.reward_server.human.test_agreement import coincidences

T = TypeVar("T")

RATERS = ("Ada", "Bob", "Carl")
SAMPLES = ("a", "b", "c", "d")


@dataclass
class ModelTicket:
    created_at: float
    judged: dict[str, float | None] = field(default_factory=dict)
    leases: dict[str, float] = field(default_factory=dict)
    outcome: Outcome | None = None
    closed_at: float = 0.0
    delivered: bool = False

    def ratings(self) -> list[float]:
        return [value for value in self.judged.values() if value is not None]


class Model:
    """What store.py says, without a database."""

    def __init__(self, rules: Rules, clock: Clock) -> None:
        self.rules = rules
        self.clock = clock
        self.tickets: dict[str, ModelTicket] = {}
        self.history: dict[str, list[str]] = {name: [] for name in RATERS}

    def expire(self) -> None:
        for ticket in self.tickets.values():
            if ticket.outcome is None and self.rules.has_expired(ticket.created_at, self.clock()):
                self.close(ticket, self.rules.expired())

    def close(self, ticket: ModelTicket, outcome: Outcome) -> None:
        ticket.outcome, ticket.closed_at, ticket.leases = outcome, self.clock(), {}

    def ask(self, names: list[str]) -> list[Outcome]:
        self.expire()
        answers: list[Outcome] = []
        for name in names:
            ticket = self.tickets.setdefault(name, ModelTicket(self.clock()))
            unsettled = ticket.closed_at + self.rules.undo_seconds - self.clock()
            if ticket.outcome is None:
                answers.append(Pending(self.rules.retry_after))
            elif unsettled > 0 and not ticket.delivered:
                answers.append(Pending(min(unsettled, self.rules.retry_after)))
            else:
                ticket.delivered = True
                answers.append(ticket.outcome)
        return answers

    def held(self, rater: str) -> str | None:
        return next((name for name, ticket in self.tickets.items() if rater in ticket.leases), None)

    def places(self, ticket: ModelTicket, rater: str) -> int:
        running = [who for who, until in ticket.leases.items() if until > self.clock() and who != rater]
        rated = [who for who, value in ticket.judged.items() if value is not None and who != rater]
        return self.rules.ratings_per_sample - len(running) - len(rated)

    def lease(self, rater: str, name: str) -> str:
        for ticket in self.tickets.values():
            ticket.leases.pop(rater, None)
        now = self.clock()
        kept = {who: until for who, until in self.tickets[name].leases.items() if until > now}
        self.tickets[name].leases = {**kept, rater: now + self.rules.lease_seconds}
        return name

    def next(self, rater: str) -> str | None:
        self.expire()
        held = self.held(rater)
        if held is not None:
            return self.lease(rater, held)
        # Tickets made in one call have one age, and dictionaries keep the order in which they were made.
        for name, ticket in self.tickets.items():
            if ticket.outcome is None and rater not in ticket.judged and self.places(ticket, rater) > 0:
                return self.lease(rater, name)
        return None

    def judge(self, rater: str, name: str, value: float | None) -> Rated:
        self.expire()
        ticket = self.tickets[name]
        if rater in ticket.judged:
            return Rated.STORED if ticket.judged[rater] == value else Rated.LEASE_LOST
        if rater not in ticket.leases:
            return Rated.LEASE_LOST
        del ticket.leases[rater]
        ticket.judged[rater] = value
        self.history[rater].append(name)
        outcome = self.rules.decide(ticket.ratings(), len(ticket.judged) - len(ticket.ratings()))
        if outcome is not None:
            self.close(ticket, outcome)
        return Rated.STORED

    def undo(self, rater: str) -> str | None:
        self.expire()
        if not self.history[rater]:
            return None
        name = self.history[rater][-1]
        ticket = self.tickets[name]
        others = [value for who, value in ticket.judged.items() if who != rater]
        ratings = [value for value in others if value is not None]
        if (
            ticket.delivered
            or self.rules.has_expired(ticket.created_at, self.clock())
            or self.rules.decide(ratings, len(others) - len(ratings)) is not None
            or self.places(ticket, rater) <= 0
        ):
            return None
        self.history[rater].pop()
        del ticket.judged[rater]
        ticket.outcome = None
        return self.lease(rater, name)


class StoreMachine(RuleBasedStateMachine):
    """Calls both and compares what they say."""

    template: Path

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.runner = asyncio.Runner()
        self.clock = Clock()

    @initialize(
        wanted=st.integers(1, 2),
        skips=st.integers(1, 2),
        expire=st.sampled_from([0.0, 100.0]),
        on_expiry=st.sampled_from(OnExpiry),
        undo=st.sampled_from([0.0, 20.0]),
    )
    def begin(self, wanted: int, skips: int, expire: float, on_expiry: OnExpiry, undo: float) -> None:
        rules = Rules(
            ratings_per_sample=wanted,
            skips_to_abstain=skips,
            expire_seconds=expire,
            on_expiry=on_expiry,
            lease_seconds=30.0,
            undo_seconds=undo,
        )
        file = self.folder / "ratings.db"
        shutil.copy(self.template, file)
        self.url = f"sqlite:///{file}"
        self.store = self.wait(Store.open(self.url, rules, self.clock))
        self.raters = {rater.name: rater for rater in self.wait(self.store.raters())}
        self.model = Model(rules, self.clock)
        self.ids: dict[str, int] = {}
        self.told: dict[str, Outcome] = {}

    def wait(self, call: Awaitable[T]) -> T:
        async def awaited() -> T:
            return await call

        return self.runner.run(awaited())

    @rule(names=st.lists(st.sampled_from(SAMPLES), min_size=1, unique=True))
    def ask(self, names: list[str]) -> None:
        answers = self.wait(self.store.outcomes([make_sample(name) for name in names]))
        assert answers == self.model.ask(names)
        for name, answer in zip(names, answers, strict=True):
            assert self.told.get(name, answer) == answer, "a final outcome has changed"
            if not isinstance(answer, Pending):
                self.told[name] = answer

    @rule(name=st.sampled_from(SAMPLES))
    def ask_with_other_content(self, name: str) -> None:
        if name in self.model.tickets:
            other: Sample = make_sample(name, "something else")
            (answer,) = self.wait(self.store.outcomes([other]))
            self.model.expire()
            assert isinstance(answer, Failed)
            assert answer.code == "SAMPLE_ID_CLASH"

    @rule(who=st.sampled_from(RATERS))
    def next(self, who: str) -> None:
        ticket = self.wait(self.store.next_ticket(self.rater(who)))
        assert (ticket and ticket.sample_id) == self.model.next(who)
        if ticket is not None:
            self.ids[ticket.sample_id] = ticket.id
            assert ticket.ratings == len(self.model.tickets[ticket.sample_id].ratings())
            assert ticket.lease_until == self.clock() + 30

    @rule(who=st.sampled_from(RATERS), value=st.sampled_from([None, 1.0, 2.0, 5.0]))
    def judge_what_is_held(self, who: str, value: float | None) -> None:
        held = self.model.held(who)
        if held is not None:
            self.judge(who, held, value)

    @rule(who=st.sampled_from(RATERS), name=st.sampled_from(SAMPLES), value=st.sampled_from([None, 1.0, 5.0]))
    def judge_anything(self, who: str, name: str, value: float | None) -> None:
        if name in self.ids:
            self.judge(who, name, value)

    def judge(self, who: str, name: str, value: float | None) -> None:
        rater, id = self.rater(who), self.ids[name]
        call = self.store.skip(rater, id) if value is None else self.store.rate(rater, id, value)
        assert self.wait(call) is self.model.judge(who, name, value)

    @rule(who=st.sampled_from(RATERS))
    def undo(self, who: str) -> None:
        ticket = self.wait(self.store.undo(self.rater(who)))
        assert (ticket and ticket.sample_id) == self.model.undo(who)

    @rule(seconds=st.sampled_from([0.5, 29.5, 30.0, 71.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.pass_by(seconds)

    @rule()
    def restart(self) -> None:
        self.wait(self.store.close())
        self.store = self.wait(Store.open(self.url, self.model.rules, self.clock))

    @invariant()
    def the_numbers_agree(self) -> None:
        if not hasattr(self, "model"):
            return
        overview = self.wait(self.store.overview())
        self.model.expire()
        tickets = self.model.tickets.values()
        opened = [ticket for ticket in tickets if ticket.outcome is None]
        leased = [ticket for ticket in opened if any(until > self.clock() for until in ticket.leases.values())]
        assert overview.queue.leased == len(leased)
        assert overview.queue.waiting == len(opened) - len(leased)
        assert overview.done == len(tickets) - len(opened)
        by_rater = {
            who: sum(ticket.judged.get(who) is not None for ticket in tickets if who in ticket.judged) for who in RATERS
        }
        assert {each.name: each.pace.rated_total for each in overview.raters} == by_rater
        shared = [ticket.ratings() for ticket in tickets if len(ticket.ratings()) > 1]
        agreement = krippendorff_alpha(coincidences(*shared))
        assert overview.agreement == (None if agreement is None else pytest.approx(agreement))

    @invariant()
    def no_ticket_has_more_leases_and_ratings_than_it_wants(self) -> None:
        if hasattr(self, "model"):
            for ticket in self.model.tickets.values():
                assert len(ticket.ratings()) + len(ticket.leases) <= self.model.rules.ratings_per_sample

    def rater(self, who: str) -> Rater:
        return self.raters[who]

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.wait(self.store.close())
        self.runner.close()
        shutil.rmtree(self.folder)


@pytest.fixture
async def template(tmp_path: Path) -> Path:
    """A database with the raters in it, to begin from without a migration each time."""
    file = tmp_path / "template.db"
    store = await Store.open(f"sqlite:///{file}", Rules())
    for name in RATERS:
        await store.add_rater(name, is_admin=False)
    await store.close()
    return file


def test_the_store_does_what_its_model_does(template: Path) -> None:
    class Machine(StoreMachine):
        pass

    Machine.template = template
    run_state_machine_as_test(
        Machine,
        settings=settings(max_examples=25, stateful_step_count=40, suppress_health_check=list(HealthCheck)),
    )
