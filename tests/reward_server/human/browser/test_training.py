"""PPO whose reward is a person at the page: real processes, a real browser."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.async_api import Browser
from playwright.async_api import TimeoutError as NothingToRateError

from reward_server.human.options import HumanOptions
from reward_server.human.store import Store
from tests.integration.training import World, assert_accounted_once, assert_finished, small_world
from tests.reward_server.human.browser.conftest import Guest
from tests.reward_server.human.test_kind import page_of
from tests.support.processes import ProcessUnderTest

pytestmark = pytest.mark.asyncio(loop_scope="module")

STEPS, BATCH = 2, 4
REWARD_OF_KEY = {"1": -1.0, "3": 0.0, "5": 1.0}


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with small_world(tmp_path) as world:
        yield world


async def test_a_person_at_the_page_trains_a_policy(world: World, browser: Browser, tmp_path: Path) -> None:
    database, page_file = f"sqlite:///{tmp_path}/ratings.db", tmp_path / "page.json"
    store = await Store.open(database, HumanOptions().rules())
    token = await store.add_rater("ann", is_admin=False)
    await store.close()
    options = {
        "database": database,
        "listen": "127.0.0.1:0",
        "endpoint_file": str(page_file),
        "undo_seconds": 0,
        "retry_after": 0.2,
    }
    reward = world.start("reward_server", "--reward", "human", "--reward-options", json.dumps(options))
    await asyncio.to_thread(reward.wait_serving, "rlhf.reward.v1.RewardService")

    trainer = world.trainer("human", reward=reward, steps=STEPS, batch_size=BATCH, eval_prompts=0)
    guest = Guest(await (await browser.new_context()).new_page(), page_of(page_file))
    await guest.sign_in(token)
    given = await rate_until_it_ends(guest, trainer)

    assert_finished(trainer)
    assert sum(given.values()) == STEPS * BATCH
    trained = world.lines("human", "samples.jsonl", "step")
    assert Counter(sample["reward"] for sample in trained) == given
    assert_accounted_once(world, "human")
    assert [line["outcome"] for line in world.lines("human", "accounting.jsonl")] == ["trained"] * STEPS * BATCH
    assert guest.wrong == []
    await guest.page.context.close()


async def rate_until_it_ends(guest: Guest, trainer: ProcessUnderTest) -> Counter[float]:
    """Press keys in turn, for as long as the trainer runs; how often each reward was given."""
    given: Counter[float] = Counter()
    keys = itertools.cycle(REWARD_OF_KEY)
    while trainer.poll() is None:
        try:
            await guest.page.wait_for_selector(".completion .text", timeout=1000)
        except NothingToRateError:
            continue
        key = next(keys)
        await guest.press(key)
        given[REWARD_OF_KEY[key]] += 1
    return given
