"""The page in a real browser, opened from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from playwright.async_api import expect

from tests.trainer.report.folders import evaluation, sample, step, write_run
from tests.trainer.report.reader import OpenReport
from trainer.report.page import write_page

pytestmark = pytest.mark.asyncio(loop_scope="module")

HOSTILE = (
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script>",
    '<img src="x" onerror="alert(3)">',
    "' onmouseover='alert(4)",
    "{{ 7 * 7 }}{% raw %}",
    "</td></table><iframe src='https://example.com'></iframe><!--",
    "",
)
NUMBERS = {
    "objective__kl": 1.0,
    "objective__kl_coef": 0.2,
    "rollout__length_mean": 9.0,
    "ppo__loss__policy": 0.1,
    "rollout__logprob_gap_mean": 1e-6,
    "time__rollout": 1.0,
    "time__learn": 2.0,
    "time__step": 3.5,
    "samples__trained": 6,
    "samples__dropped": 2,
    "samples__dropped_failed": 2,
    "reward__</script><b>component": 0.5,
}


def hostile_run(folder: Path, *, factor: float = 1.0) -> Path:
    """Four steps, resumed after the second, whose every text is hostile."""
    metrics = [
        step(at, **{name: factor * at * value for name, value in NUMBERS.items()}, reward_mean=at, incarnation=at // 3)
        for at in range(1, 5)
    ]
    evaluations = [evaluation(at, reward_mean=0.1 * at, kl_mean=at, seconds=1.0) for at in (0, 2, 4)]
    samples = [
        sample(kind, at, row, f"{text} {kind} {at}", prompt=text or "empty", components={"<i>c</i>": 0.5})
        for kind in ("evaluation", "step")
        for at in ((0, 2, 4) if kind == "evaluation" else (1, 2, 3, 4))
        for row, text in enumerate(HOSTILE)
    ]
    said = {"outcome": "dropped", "reason": "failed", "code": "<u>", "said": "<script>alert(5)</script>"}
    return write_run(
        folder, metrics + evaluations, samples=samples, accounting=[said], settings="model: <script>alert(6)</script>\n"
    )


@pytest.fixture
def page(tmp_path: Path) -> Path:
    write_page([hostile_run(tmp_path / "one")], tmp_path / "page.html")
    return tmp_path / "page.html"


@pytest.fixture
def comparison(tmp_path: Path) -> Path:
    folders = [hostile_run(tmp_path / "one"), hostile_run(tmp_path / "two", factor=2.0)]
    write_page(folders, tmp_path / "both.html")
    return tmp_path / "both.html"


async def test_hostile_text_stays_text(page: Path, open_report: OpenReport) -> None:
    reader = await open_report(page)
    for index, text in enumerate(HOSTILE):
        await reader.page.get_by_label("Prompt", exact=True).select_option(str(index))
        completion = reader.page.locator('[data-panel="prompt"]:visible .sample .text').first
        assert await completion.inner_text() == f"{text} evaluation 0"
    ours = await reader.page.locator("script").count()
    assert ours == 3
    assert await reader.page.locator("img, iframe, i, u, main b:not(.said b)").count() == 0
    assert "</script><b>component" in await reader.page.locator("#reward .u-legend").last.inner_text()
    assert "<script>alert(5)</script>" in await reader.page.locator("#drops").inner_text()


@pytest.fixture
def page_with_a_stranger(page: Path) -> Path:
    page.write_text(page.read_text().replace("<h2>", "<h2><script>document.title = 'taken over'</script>", 1))
    return page


async def test_a_script_that_got_onto_the_page_would_not_run(
    page_with_a_stranger: Path, open_report: OpenReport
) -> None:
    reader = await open_report(page_with_a_stranger)
    assert await reader.page.title() == "one · PPO run"
    assert all("Content Security Policy" in complaint for complaint in reader.wrong)
    assert reader.wrong
    reader.wrong.clear()


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_axe_finds_nothing_on_a_page_of_one_run_or_two(
    page: Path, comparison: Path, open_report: OpenReport, scheme: Literal["light", "dark"]
) -> None:
    for path in (page, comparison):
        reader = await open_report(path, color_scheme=scheme)
        await reader.page.locator("summary").click()
        assert await reader.complaints() == []


async def test_samples_are_switched_by_the_keyboard(page: Path, open_report: OpenReport) -> None:
    reader = await open_report(page)
    shown = reader.page.locator('[data-panel="step"]:visible')
    slider = reader.page.get_by_role("slider", name="Step", exact=True)
    await expect(shown).to_have_attribute("aria-label", "Step 4")
    await slider.focus()
    await reader.page.keyboard.press("ArrowLeft")
    await expect(shown).to_have_attribute("aria-label", "Step 3")
    await expect(slider).to_have_attribute("aria-valuetext", "step 3")
    await reader.page.keyboard.press("Home")
    await expect(shown).to_have_attribute("aria-label", "Step 1")

    prompts = reader.page.locator('[data-panel="prompt"]:visible')
    await expect(prompts).to_have_attribute("aria-label", "Prompt 1")
    await reader.page.get_by_label("Prompt", exact=True).focus()
    await reader.page.keyboard.press("ArrowDown")
    await expect(prompts).to_have_attribute("aria-label", "Prompt 2")


async def test_the_arrow_keys_tell_a_charts_values_step_by_step(comparison: Path, open_report: OpenReport) -> None:
    reader = await open_report(comparison)
    chart = reader.page.get_by_role("slider", name="Mean reward: step")
    await chart.focus()
    await reader.page.keyboard.press("Home")
    await expect(chart).to_have_attribute(
        "aria-valuetext", "step 0: one: training –, one: held out 0, two: training –, two: held out 0"
    )
    for _ in range(3):
        await reader.page.keyboard.press("ArrowRight")
    await expect(chart).to_have_attribute(
        "aria-valuetext", "step 3: one: training 3, one: held out 0.2, two: training 3, two: held out 0.2"
    )
    values = reader.page.locator("#reward .u-legend").first.locator(".u-value")
    assert await values.all_inner_texts() == ["3", "3", "0.2", "3", "0.2"]


async def test_two_runs_are_drawn_apart_and_their_stacks_hold_the_sums(
    comparison: Path, open_report: OpenReport
) -> None:
    reader = await open_report(comparison)
    titles = await reader.page.locator("#time figcaption").all_inner_texts()
    assert [title.partition(" seconds")[0] for title in titles][:2] == [
        "Seconds by phase: one",
        "Seconds by phase: two",
    ]
    assert await reader.page.locator("figure canvas").count() == await reader.page.locator("figure").count()
    blank = await reader.page.evaluate(
        """[...document.querySelectorAll("figure canvas")].filter((canvas) => {
            const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
            return !pixels.some((value) => value);
        }).length"""
    )
    assert blank == 0


@pytest.mark.parametrize("width", [360, 768, 1400])
async def test_no_width_of_a_screen_needs_scrolling_sideways(
    comparison: Path, open_report: OpenReport, width: int
) -> None:
    reader = await open_report(comparison, viewport={"width": width, "height": 800})
    wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert await reader.page.evaluate(wide) == 0


async def test_print_is_dark_on_white_whatever_the_screen_shows(page: Path, open_report: OpenReport) -> None:
    reader = await open_report(page, color_scheme="dark")
    await reader.page.emulate_media(media="print", color_scheme="dark")
    colours = await reader.page.evaluate(
        "['--ink', '--curve-0'].map((name) => getComputedStyle(document.documentElement).getPropertyValue(name))"
    )
    assert colours == ["#1b2130", "#0072b2"]
    await expect(reader.page.get_by_label("Prompt", exact=True)).to_be_hidden()
    await expect(reader.page.locator("nav")).to_be_hidden()


async def test_without_scripts_every_sample_and_number_is_there(page: Path, open_report: OpenReport) -> None:
    reader = await open_report(page, java_script_enabled=False)
    assert await reader.page.locator('[data-panel="prompt"]:visible').count() == len(HOSTILE)
    assert await reader.page.locator('[data-panel="step"]:visible').count() == 4
    await expect(reader.page.locator("#reward .told").first).to_contain_text("training: 1 → 4")
