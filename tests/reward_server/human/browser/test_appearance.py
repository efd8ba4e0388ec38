from __future__ import annotations

from typing import Any, Literal

import pytest
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import expect

from reward_server.human.rules import Rules, Scale
from tests.reward_server.human.browser.conftest import Guest, OpenPage, ServedSite
from tests.reward_server.human.site import sample

pytestmark = pytest.mark.asyncio(loop_scope="module")

PHONE: dict[str, Any] = {"viewport": {"width": 360, "height": 640}, "has_touch": True, "is_mobile": True}
LONG = "word " * 300 + "x" * 500
SCALES = {
    "five": Scale.of_steps(1, 5),
    "eleven": Scale.of_steps(0, 10),
    "named": Scale.of_labels({"Unacceptable": 0, "Needs improvement": 1, "Good enough": 2, "Excellent": 3}),
}


async def _complaints(guest: Guest) -> list[str]:
    """What axe has against the page as it is."""
    found = (await Axe().run(guest.page)).response["violations"]
    return [f"{each['id']}: {node['target']} {node['failureSummary']}" for each in found for node in each["nodes"]]


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_axe_finds_nothing_on_any_page(
    site: ServedSite, open_page: OpenPage, scheme: Literal["light", "dark"]
) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?", "name": "ann"}]
    await site.ask(sample("a", "control \x07 character"), sample("b", LONG, LONG, turns))
    guest = await open_page(color_scheme=scheme)
    await guest.page.goto(f"{site.url}/sign-in")
    assert await _complaints(guest) == []
    await guest.page.get_by_label("Token").fill("wrong")
    await guest.page.keyboard.press("Enter")
    await expect(guest.page.locator(".problem")).to_be_visible()
    assert await _complaints(guest) == []
    await guest.sign_in(await site.rater("ann", is_admin=True))
    assert await _complaints(guest) == []
    await guest.page.keyboard.press("?")
    assert await _complaints(guest) == []
    await guest.page.keyboard.press("Escape")
    await guest.press("4")
    await guest.page.get_by_text("Instructions").click()
    assert await _complaints(guest) == []
    await guest.press("4")
    await expect(guest.page.get_by_role("heading", name="Nothing to rate now")).to_be_visible()
    assert await _complaints(guest) == []
    await site.ask(sample("a"), sample("b", LONG, LONG, turns))
    await guest.press("u")
    await expect(guest.page.locator(".problem")).to_contain_text("Nothing to undo")
    assert await _complaints(guest) == []
    for path in ("/admin", "/none"):
        await guest.page.goto(f"{site.url}{path}")
        assert await _complaints(guest) == []
    guest.wrong = [text for text in guest.wrong if "Failed to load resource" not in text]


@pytest.mark.parametrize("rules", [Rules(scale=scale) for scale in SCALES.values()], ids=SCALES)
async def test_a_phone_shows_the_whole_width_and_buttons_for_thumbs(site: ServedSite, open_page: OpenPage) -> None:
    await site.ask(sample("x" * 200, LONG, LONG))
    guest = await open_page(**PHONE)
    await guest.page.goto(f"{site.url}/sign-in")
    await _fits_a_thumb(guest)
    await guest.sign_in(await site.rater("Bartholomew Featherstonehaugh", is_admin=True))
    await _fits_a_thumb(guest)
    dock = await guest.page.locator(".dock").bounding_box()
    assert dock is not None
    assert dock["y"] + dock["height"] == pytest.approx(640, abs=1), "the scale is not at the foot of the screen"
    assert dock["height"] < 320, "the scale leaves the completion less than half of the screen"
    await guest.page.goto(f"{site.url}/admin")
    await _fits_a_thumb(guest)


async def _fits_a_thumb(guest: Guest) -> None:
    wide = await guest.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wide == 0
    small = await guest.page.evaluate(
        """[...document.querySelectorAll("button, summary, header a, .exports a, main input:not([type=hidden])")]
            .filter((each) => each.checkVisibility() && !each.closest("dialog"))
            .map((each) => ({ text: each.textContent.trim(), box: each.getBoundingClientRect() }))
            .filter(({ box }) => box.height < 44 || box.width < 44)
            .map(({ text, box }) => `${text} ${box.width}x${box.height}`)"""
    )
    assert small == []


async def test_the_page_is_as_dark_as_the_system_is(site: ServedSite, open_page: OpenPage) -> None:
    brightness = {}
    for scheme in ("light", "dark"):
        guest = await open_page(color_scheme=scheme)
        await guest.page.goto(f"{site.url}/sign-in")
        red, *_ = await guest.page.evaluate(
            "['backgroundColor', 'color'].map((name) => parseInt(getComputedStyle(document.body)[name].slice(4)))"
        )
        brightness[scheme] = red
    assert brightness["light"] > 200
    assert brightness["dark"] < 50


async def test_prompt_and_completion_stand_side_by_side_where_there_is_room(
    site: ServedSite, open_page: OpenPage
) -> None:
    await site.ask(sample("a"))
    guest = await open_page(viewport={"width": 1280, "height": 800})
    await guest.sign_in(await site.rater("ann"))
    places = []
    for width in (1280, 800):
        await guest.page.set_viewport_size({"width": width, "height": 800})
        prompt = await guest.page.locator(".prompt").bounding_box()
        completion = await guest.page.locator(".completion").bounding_box()
        assert prompt is not None
        assert completion is not None
        places.append((completion["x"] >= prompt["x"] + prompt["width"], completion["y"] > prompt["y"]))
    assert places == [(True, False), (False, True)]


async def test_every_control_can_be_reached_by_tab(site: ServedSite, open_page: OpenPage) -> None:
    await site.ask(sample("a"))
    guest = await open_page()
    await guest.sign_in(await site.rater("ann"))
    reached = []
    for _ in range(13):
        await guest.page.keyboard.press("Tab")
        reached.append(await guest.page.evaluate("document.activeElement.textContent.trim().replace(/\\s+/g, ' ')"))
    assert reached[:6] == ["Skip to the content", "Film reviews", "? Keys", "ann Sign out", "Instructions", "1"]
    assert reached[6:12] == ["2", "3", "4", "5", "Undo u", "Skip s"]
