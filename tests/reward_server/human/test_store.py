"""The queue, on SQLite and on PostgreSQL."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress

import pytest
from sqlalchemy.ext.asyncio import create_async_engine

from reward_server.human.database import DatabaseUrlError
from reward_server.human.rules import Aggregate, OnExpiry, Rules, Scale
from reward_server.human.store import Store, StoreUnavailable
from reward_server.human.tickets import Rated, Rater, Ticket
from reward_server.results import Abstained, Failed, Outcome, Pending, Scored
from tests.reward_server.human.conftest import Clock, OpenStore, make_sample, rater_of
from tests.support.postgres import PostgresServer


async def ask(store: Store, *sample_ids: str) -> list[Outcome]:
    return await store.outcomes([make_sample(sample_id) for sample_id in sample_ids])


async def take(store: Store, rater: Rater) -> Ticket:
    ticket = await store.next_ticket(rater)
    assert ticket is not None
    return ticket


async def test_a_sample_is_pending_until_it_is_rated_and_then_scored_for_ever(open_store: OpenStore) -> None:
    store = await open_store(retry_after=7.0)
    ada = await rater_of(store, "Ada")
    assert await ask(store, "a", "b") == [Pending(7.0), Pending(7.0)]
    ticket = await take(store, ada)
    assert (ticket.sample_id, ticket.completion) == ("a", "Paris.")
    assert await store.rate(ada, ticket.id, 4) is Rated.STORED
    scored = Scored(0.5, {"rating": 4.0, "ratings": 1.0, "spread": 0.0})
    assert await ask(store, "a", "b") == [scored, Pending(7.0)]
    again = await open_store()
    assert await ask(again, "b", "a") == [Pending(5.0), scored]


async def test_other_content_under_the_same_id_is_a_clash_and_delivers_nothing(open_store: OpenStore) -> None:
    store = await open_store()
    ada = await rater_of(store, "Ada")
    other = make_sample("a", "London.")
    await ask(store, "a")
    assert isinstance((await store.outcomes([other]))[0], Failed)
    ticket = await take(store, ada)
    await store.rate(ada, ticket.id, 5)
    (clash,) = await store.outcomes([other])
    assert isinstance(clash, Failed)
    assert clash.code == "SAMPLE_ID_CLASH"
    assert await store.undo(ada) is not None


async def test_the_same_id_in_two_runs_names_two_samples(open_store: OpenStore) -> None:
    store = await open_store()
    await store.outcomes([make_sample("a", run_id="one"), make_sample("a", "London.", run_id="two")])
    assert (await store.queue()).waiting == 2


async def test_a_sample_twice_in_one_call_is_one_ticket(open_store: OpenStore) -> None:
    store = await open_store()
    assert await ask(store, "a", "a") == [Pending(5.0)] * 2
    assert (await store.queue()).waiting == 1


async def test_two_raters_never_hold_the_same_ticket(open_store: OpenStore) -> None:
    store = await open_store()
    ada, bob = await rater_of(store, "Ada"), await rater_of(store, "Bob")
    await ask(store, "a", "b")
    first, second = await take(store, ada), await take(store, bob)
    assert {first.sample_id, second.sample_id} == {"a", "b"}
    assert (await take(store, ada)).id == first.id
    carl = await rater_of(store, "Carl")
    assert await store.next_ticket(carl) is None


async def test_many_raters_at_once_get_a_ticket_each(database: str) -> None:
    # Two stores, as two replicas have them.
    stores = [await Store.open(database, Rules()) for _ in range(2)]
    raters = [await rater_of(stores[0], f"rater {number}") for number in range(12)]
    await ask(stores[0], *(f"s{number}" for number in range(12)))
    taken = await asyncio.gather(*(take(stores[number % 2], rater) for number, rater in enumerate(raters)))
    assert len({ticket.id for ticket in taken}) == 12
    for store in stores:
        await store.close()


async def test_a_lease_that_ran_out_goes_to_somebody_else_and_the_late_rating_is_refused(
    open_store: OpenStore, clock: Clock
) -> None:
    store = await open_store(lease_seconds=60)
    ada, bob = await rater_of(store, "Ada"), await rater_of(store, "Bob")
    await ask(store, "a")
    ticket = await take(store, ada)
    clock.pass_by(59)
    assert await store.next_ticket(bob) is None
    clock.pass_by(1)
    assert (await take(store, bob)).id == ticket.id
    assert await store.rate(ada, ticket.id, 1) is Rated.LEASE_LOST
    assert await store.rate(bob, ticket.id, 5) is Rated.STORED
    assert await ask(store, "a") == [Scored(1.0, {"rating": 5.0, "ratings": 1.0, "spread": 0.0})]


async def test_a_lease_that_ran_out_is_good_while_nobody_else_wants_the_ticket(
    open_store: OpenStore, clock: Clock
) -> None:
    store = await open_store(lease_seconds=60)
    ada = await rater_of(store, "Ada")
    await ask(store, "a")
    ticket = await take(store, ada)
    clock.pass_by(1000)
    assert await store.rate(ada, ticket.id, 5) is Rated.STORED


async def test_looking_at_the_ticket_again_prolongs_the_lease(open_store: OpenStore, clock: Clock) -> None:
    store = await open_store(lease_seconds=60)
    ada, bob = await rater_of(store, "Ada"), await rater_of(store, "Bob")
    await ask(store, "a")
    await take(store, ada)
    clock.pass_by(50)
    assert (await take(store, ada)).lease_until == clock.time + 60
    clock.pass_by(50)
    assert await store.next_ticket(bob) is None


async def test_a_ticket_is_rated_only_by_who_holds_it(open_store: OpenStore) -> None:
    store = await open_store()
    ada, bob = await rater_of(store, "Ada"), await rater_of(store, "Bob")
    await ask(store, "a")
    ticket = await take(store, ada)
    assert await store.rate(bob, ticket.id, 1) is Rated.LEASE_LOST
    assert await store.skip(bob, ticket.id) is Rated.LEASE_LOST
    assert await store.rate(ada, ticket.id + 1, 1) is Rated.LEASE_LOST
    assert await ask(store, "a") == [Pending(5.0)]


async def test_the_same_rating_posted_twice_is_stored_once(open_store: OpenStore) -> None:
    store = await open_store()
    ada = await rater_of(store, "Ada")
    await ask(store, "a")
    ticket = await take(store, ada)
    assert await store.rate(ada, ticket.id, 2) is Rated.STORED
    assert await store.rate(ada, ticket.id, 2) is Rated.STORED
    assert await store.rate(ada, ticket.id, 3) is Rated.LEASE_LOST
    assert await store.skip(ada, ticket.id) is Rated.LEASE_LOST
    assert [row.value async for row in store.export()] == [2.0]


async def test_a_value_that_the_scale_does_not_have_is_refused(open_store: OpenStore) -> None:
    store = await open_store()
    ada = await rater_of(store, "Ada")
    await ask(store, "a")
    ticket = await take(store, ada)
    for value in (0, 6, 2.5, float("nan")):
        with pytest.raises(ValueError, match="scale"):
            await store.rate(ada, ticket.id, value)


async def test_several_ratings_come_from_different_people_and_are_aggregated(open_store: OpenStore) -> None:
    store = await open_store(ratings_per_sample=3, aggregate=Aggregate.MEDIAN)
    raters = [await rater_of(store, name) for name in ("Ada", "Bob", "Carl", "Dora")]
    await ask(store, "a")
    tickets = [await take(store, rater) for rater in raters[:3]]
    assert len({ticket.id for ticket in tickets}) == 1
    assert await store.next_ticket(raters[3]) is None
    for rater, value in zip(raters[:3], (1, 5, 4), strict=True):
        assert await ask(store, "a") == [Pending(5.0)]
        assert await store.rate(rater, tickets[0].id, value) is Rated.STORED
        assert await store.next_ticket(rater) is None
    assert await ask(store, "a") == [Scored(0.5, {"rating": 4.0, "ratings": 3.0, "spread": 4.0})]


async def test_a_skip_abstains(open_store: OpenStore) -> None:
    store = await open_store()
    ada = await rater_of(store, "Ada")
    await ask(store, "a")
    assert await store.skip(ada, (await take(store, ada)).id) is Rated.STORED
    (outcome,) = await ask(store, "a")
    assert isinstance(outcome, Abstained)


async def test_a_skip_passes_the_ticket_on_while_more_skips_are_asked_for(open_store: OpenStore) -> None:
    store = await open_store(skips_to_abstain=2)
    ada, bob = await rater_of(store, "Ada"), await rater_of(store, "Bob")
    await ask(store, "a", "b")
    first = await take(store, ada)
    await store.skip(ada, first.id)
    assert (await take(store, ada)).id != first.id
    assert (await take(store, bob)).id == first.id
    await store.skip(bob, first.id)
    outcomes = await ask(store, "a", "b")
    assert [type(outcome) for outcome in outcomes] == [Abstained, Pending]


async def test_a_ticket_that_is_skipped_for_good_is_taken_from_who_else_holds_it(open_store: OpenStore) -> None:
    store = await open_store(ratings_per_sample=2)
    ada, bob = await rater_of(store, "Ada"), await rater_of(store, "Bob")
    await ask(store, "a")
    ticket = await take(store, ada)
    await take(store, bob)
    await store.skip(ada, ticket.id)
    assert await store.rate(bob, ticket.id, 3) is Rated.LEASE_LOST
    assert await store.next_ticket(bob) is None


@pytest.mark.parametrize(
    ("on_expiry", "outcome"),
    [
        (OnExpiry.ABSTAIN, Abstained("not rated within 60 s")),
        (OnExpiry.FAIL, Failed("EXPIRED", "not rated within 60 s")),
    ],
)
async def test_a_ticket_that_is_too_old_is_given_up(
    open_store: OpenStore, clock: Clock, on_expiry: OnExpiry, outcome: Outcome
) -> None:
    store = await open_store(expire_seconds=60, on_expiry=on_expiry)
    ada = await rater_of(store, "Ada")
    await ask(store, "a")
    ticket = await take(store, ada)
    clock.pass_by(59)
    assert await ask(store, "a") == [Pending(5.0)]
    clock.pass_by(1)
    assert await store.rate(ada, ticket.id, 3) is Rated.LEASE_LOST
    assert await store.next_ticket(ada) is None
    assert await ask(store, "a") == [outcome]
    assert await store.undo(ada) is None


async def test_undo_gives_the_ticket_back_until_the_outcome_is_answered(open_store: OpenStore) -> None:
    store = await open_store()
    ada, bob = await rater_of(store, "Ada"), await rater_of(store, "Bob")
    await ask(store, "a", "b")
    ticket = await take(store, ada)
    await store.rate(ada, ticket.id, 1)
    await take(store, ada)
    undone = await store.undo(ada)
    assert undone is not None
    assert undone.id == ticket.id
    # What Ada was shown meanwhile is anybody's again; what she took back is hers.
    assert (await take(store, bob)).id != ticket.id
    assert (await take(store, ada)).id == ticket.id
    assert await ask(store, "a") == [Pending(5.0)]
    await store.rate(ada, ticket.id, 5)
    assert await ask(store, "a") == [Scored(1.0, {"rating": 5.0, "ratings": 1.0, "spread": 0.0})]
    assert await store.undo(ada) is None


async def test_an_outcome_is_kept_from_trainers_for_as_long_as_it_should_be_undoable(
    open_store: OpenStore, clock: Clock
) -> None:
    store = await open_store(undo_seconds=8, retry_after=5)
    ada = await rater_of(store, "Ada")
    await ask(store, "a")
    await store.rate(ada, (await take(store, ada)).id, 1)
    assert await ask(store, "a") == [Pending(5.0)]
    clock.pass_by(6)
    assert await ask(store, "a") == [Pending(2.0)]
    undone = await store.undo(ada)
    assert undone is not None
    await store.rate(ada, undone.id, 5)
    clock.pass_by(8)
    scored = Scored(1.0, {"rating": 5.0, "ratings": 1.0, "spread": 0.0})
    assert await ask(store, "a") == [scored]
    # A clock that is set back takes nothing back that was answered.
    clock.pass_by(-5)
    assert await ask(store, "a") == [scored]


async def test_undo_goes_back_one_after_the_other(open_store: OpenStore) -> None:
    store = await open_store()
    ada = await rater_of(store, "Ada")
    await ask(store, "a", "b")
    first = await take(store, ada)
    await store.rate(ada, first.id, 1)
    second = await take(store, ada)
    await store.skip(ada, second.id)
    undone = [await store.undo(ada), await store.undo(ada), await store.undo(ada)]
    assert [ticket and ticket.id for ticket in undone] == [second.id, first.id, None]


async def test_a_skip_is_not_undone_when_somebody_else_has_the_ticket(open_store: OpenStore, clock: Clock) -> None:
    store = await open_store(skips_to_abstain=2, lease_seconds=60)
    ada, bob = await rater_of(store, "Ada"), await rater_of(store, "Bob")
    await ask(store, "a")
    await store.skip(ada, (await take(store, ada)).id)
    ticket = await take(store, bob)
    assert await store.undo(ada) is None
    assert await store.rate(bob, ticket.id, 3) is Rated.STORED
    assert await store.undo(ada) is None


async def test_undo_withdraws_nothing_that_others_have_decided(open_store: OpenStore) -> None:
    store = await open_store(ratings_per_sample=2)
    ada, bob = await rater_of(store, "Ada"), await rater_of(store, "Bob")
    await ask(store, "a")
    ticket = await take(store, ada)
    await store.rate(ada, ticket.id, 3)
    await take(store, bob)
    await store.skip(bob, ticket.id)
    assert await store.undo(ada) is None
    assert len([row async for row in store.export()]) == 2


async def test_other_rules_have_tickets_of_their_own(open_store: OpenStore) -> None:
    old = await open_store(ratings_per_sample=2)
    ada, bob = await rater_of(old, "Ada"), await rater_of(old, "Bob")
    await ask(old, "a")
    ticket = await take(old, ada)
    await old.rate(ada, ticket.id, 5)
    new = await open_store(scale=Scale.of_labels({"bad": 0, "good": 1}))
    assert await new.next_ticket(ada) is None
    assert await ask(new, "a") == [Pending(5.0)]
    assert await new.undo(ada) is None
    await take(old, bob)
    assert await new.rate(bob, ticket.id, 1) is Rated.LEASE_LOST
    fresh = await take(new, bob)
    assert fresh.id != ticket.id
    await new.rate(bob, fresh.id, 1)
    assert [(await new.pace(rater)).rated_total for rater in (ada, bob)] == [0, 1]
    assert [(each.name, each.pace.rated_total) for each in (await old.overview()).raters] == [("Ada", 1), ("Bob", 0)]
    assert [row.value async for row in new.export()] == [5.0, 1.0]


async def test_a_removed_rater_can_do_nothing_and_their_ratings_stay(open_store: OpenStore) -> None:
    store = await open_store()
    token = await store.add_rater("Ada", is_admin=True)
    ada = await store.rater_by_token(token)
    assert ada is not None
    assert ada.is_admin
    bob = await rater_of(store, "Bob")
    await ask(store, "a", "b")
    await store.rate(ada, (await take(store, ada)).id, 3)
    held = await take(store, ada)
    assert await store.remove_rater("Ada")
    assert not await store.remove_rater("Ada")
    assert await store.rater_by_token(token) is None
    assert await store.rater_by_session(ada.id, ada.credential) is None
    assert (await take(store, bob)).id == held.id
    assert [row.rater async for row in store.export()] == ["Ada"]


async def test_a_rater_who_comes_back_has_a_new_token_and_no_old_session(open_store: OpenStore) -> None:
    store = await open_store()
    first = await store.add_rater("Ada", is_admin=False)
    before = await store.rater_by_token(first)
    with pytest.raises(ValueError, match="already"):
        await store.add_rater("Ada", is_admin=False)
    await store.remove_rater("Ada")
    after = await store.rater_by_token(await store.add_rater("Ada", is_admin=False))
    assert before is not None
    assert after is not None
    assert after.id == before.id
    assert await store.rater_by_token(first) is None
    assert await store.rater_by_session(before.id, before.credential) is None
    assert await store.rater_by_session(after.id, after.credential) == after
    assert await store.raters() == [after]


async def test_a_name_must_be_one(open_store: OpenStore) -> None:
    store = await open_store()
    for name in ("", " Ada", "A\nB", "x" * 65):
        with pytest.raises(ValueError, match="name"):
            await store.add_rater(name, is_admin=False)


async def test_a_token_is_not_stored(open_store: OpenStore, database: str) -> None:
    store = await open_store()
    token = await store.add_rater("Ada", is_admin=False)
    engine = create_async_engine(database.replace("sqlite:", "sqlite+aiosqlite:").replace("ql:", "ql+psycopg:"))
    async with engine.connect() as connection:
        rows = (await connection.exec_driver_sql("SELECT * FROM raters")).all()
    await engine.dispose()
    assert len(rows) == 1
    assert token not in repr(rows)


async def test_the_secret_is_the_same_after_a_restart(open_store: OpenStore) -> None:
    first, second = await open_store(), await open_store()
    assert await first.secret() == await second.secret()
    assert len(await first.secret()) == 32


async def test_the_overview_counts_tickets_people_and_agreement(open_store: OpenStore, clock: Clock) -> None:
    clock.time = 86400.0 * 100 + 3 * 3600
    store = await open_store(ratings_per_sample=2, lease_seconds=60)
    ada, bob = await rater_of(store, "Ada"), await rater_of(store, "Bob")
    await rater_of(store, "Carl")
    assert (await store.queue()).oldest_age_seconds is None
    await ask(store, "a", "b", "c", "d", "e")
    for ratings in ((1, 1), (5, 5), (1, 2)):
        for rater, value in zip((ada, bob), ratings, strict=True):
            await store.rate(rater, (await take(store, rater)).id, value)
    clock.pass_by(30 * 60)
    await store.skip(ada, (await take(store, ada)).id)
    await take(store, bob)
    overview = await store.overview()
    assert (overview.queue.waiting, overview.queue.leased, overview.done) == (0, 1, 4)
    assert overview.queue.oldest_age_seconds == 30 * 60
    assert [(each.name, each.pace.rated_total, each.skipped) for each in overview.raters] == [
        ("Ada", 3, 1),
        ("Bob", 3, 0),
        ("Carl", 0, 0),
    ]
    # By hand: D_o = (0 + 0 + 2) / 6, D_e = (2 * 6 * 19.5) / (6 * 5), pooled 1 1 5 5 1 2 with mean 2.5.
    assert overview.agreement == pytest.approx(1 - (2 / 6) / (2 * 6 * 19.5 / 30))
    clock.pass_by(45 * 60)
    pace = await store.pace(ada)
    assert (pace.rated_today, pace.rated_total, pace.per_hour) == (3, 3, 0.0)
    clock.pass_by(86400)
    assert (await store.pace(ada)).rated_today == 0


async def test_the_export_tells_every_judgement_in_order(
    open_store: OpenStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reward_server.human.store._EXPORTED_AT_ONCE", 3)
    clock.time = 0.0
    store = await open_store()
    ada = await rater_of(store, "Ada")
    many = [f"s{number:04}" for number in range(7)]
    await ask(store, *many)
    for number, _ in enumerate(many):
        ticket = await take(store, ada)
        await (store.skip(ada, ticket.id) if number == 1 else store.rate(ada, ticket.id, 5))
    rows = [row async for row in store.export()]
    assert [row.sample_id for row in rows] == many
    first, second = rows[:2]
    assert (first.value, first.outcome, first.reward, first.rated_at) == (
        5.0,
        "scored",
        1.0,
        "1970-01-01T00:00:00.000+00:00",
    )
    assert (second.value, second.outcome, second.reward) == (None, "abstained", None)
    assert first.prompt == "What is the capital of France?"


async def test_texts_come_back_as_they_were(open_store: OpenStore) -> None:
    store = await open_store()
    ada = await rater_of(store, "Ada")
    text = "tab\t, 中文, emoji 🎈, \ufffd, <b>, '; DROP TABLE tickets; --, \r\n end"
    messages = [{"role": "user", "content": text, "extra": {"n": [1, None]}}]
    await store.outcomes([make_sample("a", text + "\0", prompt=text, messages=messages)])
    ticket = await take(store, ada)
    assert ticket.prompt == text
    # PostgreSQL cannot store U+0000: a picture of it stands there.
    assert ticket.completion == text + "\u2400"
    assert '"n": [1, null]' in ticket.messages_json
    assert await store.outcomes([make_sample("a", text + "\0")]) == [Pending(5.0)]


async def test_calls_that_are_cancelled_leave_a_store_that_works(open_store: OpenStore) -> None:
    store = await open_store()
    ada = await rater_of(store, "Ada")
    chance = random.Random(1)
    for number in range(40):
        call = asyncio.create_task(ask(store, f"s{number}"))
        for _ in range(chance.randrange(25)):
            await asyncio.sleep(0)
        call.cancel()
        with suppress(asyncio.CancelledError):
            await call
    assert await ask(store, *(f"s{number}" for number in range(40))) == [Pending(5.0)] * 40
    assert await store.rate(ada, (await take(store, ada)).id, 3) is Rated.STORED


@pytest.mark.parametrize("url", ["mysql://host/ratings", "sqlite://", "sqlite:///:memory:", "ratings.db"])
async def test_a_url_of_no_use_is_refused(url: str) -> None:
    with pytest.raises(DatabaseUrlError, match="sqlite:///file"):
        await Store.open(url, Rules())


async def test_a_database_that_stops_is_unavailable_and_back_when_it_is(postgres: PostgresServer) -> None:
    store = await Store.open(postgres.new_database(), Rules())
    assert await ask(store, "a") == [Pending(5.0)]
    await asyncio.to_thread(postgres.stop)
    try:
        with pytest.raises(StoreUnavailable, match="does not answer") as refused:
            await ask(store, "a")
        assert "SELECT" not in str(refused.value)
    finally:
        await asyncio.to_thread(postgres.start)
    assert await ask(store, "a") == [Pending(5.0)]
    await store.close()
