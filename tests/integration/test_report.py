"""The page of a real run that was resumed, and whose reward drops samples."""

from __future__ import annotations

import pytest

from tests.integration.test_failures_reward import PICKY
from tests.integration.training import World, assert_finished
from tests.support.browser import chromium
from tests.trainer.report.reader import Reader
from trainer.report.__main__ import main
from trainer.report.reading import read_run

SECTIONS = [
    "Numbers",
    "Reward",
    "Distance from the reference",
    "Completions",
    "Learning",
    "Trainer and policy server",
    "Where the time went",
    "Dropped prompts",
    "Held-out completions",
    "Training samples",
    "Settings",
]


@pytest.fixture(scope="session")
def resumed(world: World) -> str:
    """The name of a run that was finished after two steps and then went on to the fourth."""
    reward = world.reward_server(PICKY, name="picky-to-see")
    for flags, steps in (((), 2), (("--resume",), 4)):
        trainer = world.trainer("seen", "--track", "tensorboard", *flags, reward=reward, steps=steps, batch_size=16)
        assert_finished(trainer)
    return "seen"


def test_metrics_tell_which_start_made_a_step_and_what_each_boundary_took(world: World, resumed: str) -> None:
    run = read_run(world.folder / resumed, name=resumed)
    steps = world.lines(resumed, "metrics.jsonl", "step")
    assert run.resumed_after() == [2]
    assert [line["incarnation"] for line in world.lines(resumed, "metrics.jsonl", "evaluation")] == [1, 1, 2]
    # Every step is saved, and step 2 once more at the restart; the evaluation after it was made by the first start.
    assert [line.get("time/checkpoint", 0) > 0 for line in steps] == [False, True, True, True]
    assert [line.get("time/evaluate", 0) > 0 for line in steps] == [True, False, False, False]


async def test_the_page_of_a_real_run_shows_every_section_and_asks_nobody(world: World, resumed: str) -> None:
    assert main([str(world.folder / resumed)]) == 0
    async with chromium() as browser:
        reader = await Reader.open(browser, world.folder / resumed / "report.html")
        headings = [heading for heading in await reader.headings() if heading != "Worth a look"]
        text = await reader.page.locator("main").inner_text()
        drops = await reader.page.locator("#drops table").last.inner_text()
        complaints = await reader.complaints()

    assert headings == SECTIONS
    assert reader.wrong == []
    assert complaints == []
    assert "2, resumed after step 2" in text
    assert "4 of 4" in text
    assert "abstained" in drops
    assert "NOT_FINITE" in drops
    assert world.lines(resumed, "samples.jsonl", "step")[-1]["completion"].strip()[:10] in text


async def test_two_real_runs_are_compared_on_one_page(world: World, resumed: str, uninterrupted: str) -> None:
    page = world.folder / "both.html"
    assert main([str(world.folder / uninterrupted), str(world.folder / resumed), "--output", str(page)]) == 0
    async with chromium() as browser:
        reader = await Reader.open(browser, page)
        differing = await reader.page.locator("#settings table").first.inner_text()
        legend = await reader.page.locator("#reward .u-legend").first.inner_text()

    assert reader.wrong == []
    assert "batch_size" in differing
    assert "learning_rate" not in differing
    assert all(f"{name}: {kind}" in legend for name in (uninterrupted, resumed) for kind in ("training", "held out"))
