from __future__ import annotations

import asyncio

import pytest
from playwright.async_api import expect
from starlette.responses import HTMLResponse

from tests.reward_server.human.browser.conftest import OpenPage, ServedSite
from tests.reward_server.human.site import sample

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_a_key_rates_and_the_next_completion_comes(site: ServedSite, open_page: OpenPage) -> None:
    await site.ask(sample("a"), sample("b"))
    guest = await open_page()
    await guest.sign_in(await site.rater("ann"))
    assert await guest.completion() == "completion a"
    await guest.press("4")
    assert await guest.completion() == "completion b"
    assert await site.ratings() == [("a", "ann", 4.0)]


async def test_a_click_rates(site: ServedSite, open_page: OpenPage) -> None:
    await site.ask(sample("a"), sample("b"))
    guest = await open_page()
    await guest.sign_in(await site.rater("ann"))
    await guest.page.get_by_role("group", name="How good is the completion?").get_by_role("button", name="2").click()
    await expect(guest.page.locator(".completion .text")).to_have_text("completion b")
    assert await site.ratings() == [("a", "ann", 2.0)]


async def test_keys_skip_and_undo(site: ServedSite, open_page: OpenPage) -> None:
    await site.ask(sample("a"), sample("b"), sample("c"))
    guest = await open_page()
    await guest.sign_in(await site.rater("ann"))
    await guest.press("s")
    await guest.press("5")
    assert await site.ratings() == [("a", "ann", None), ("b", "ann", 5.0)]
    await guest.press("u")
    assert await guest.completion() == "completion b"
    assert await site.ratings() == [("a", "ann", None)]
    await guest.press("u")
    assert await guest.completion() == "completion a"
    assert await site.ratings() == []


async def test_the_page_counts_what_was_rated(site: ServedSite, open_page: OpenPage) -> None:
    await site.ask(sample("a"), sample("b"))
    guest = await open_page()
    await guest.sign_in(await site.rater("ann"))
    await guest.press("1")
    await expect(guest.page.locator(".pace")).to_have_text("Rated 1. 1 today 1 in the last hour 1 in all")


async def test_two_raters_never_have_the_same_completion(site: ServedSite, open_page: OpenPage) -> None:
    await site.ask(*(sample(str(number)) for number in range(12)))
    guests = [await open_page(), await open_page()]
    for guest, name in zip(guests, ("ann", "bob"), strict=True):
        await guest.sign_in(await site.rater(name))
    for _ in range(6):
        ann, bob = [await guest.completion() for guest in guests]
        assert ann != bob
        await asyncio.gather(*(guest.press("3") for guest in guests))
    stored = await site.ratings()
    assert sorted(sample_id for sample_id, _, _ in stored) == sorted(str(number) for number in range(12))
    assert [rater for _, rater, _ in stored].count("ann") == 6


async def test_a_page_loaded_again_shows_the_same_completion(site: ServedSite, open_page: OpenPage) -> None:
    await site.ask(sample("a"), sample("b"), sample("c"))
    guest = await open_page()
    await guest.sign_in(await site.rater("ann"))
    await guest.press("1")
    await guest.page.reload()
    assert await guest.completion() == "completion b"


async def test_scripts_in_prompt_and_completion_are_text(site: ServedSite, open_page: OpenPage) -> None:
    evil = (
        "<script>alert(1)</script><img src=x onerror=alert(2)><svg/onload=alert(3)>"
        "</div></main><hx-partial hx-target=body></hx-partial><a hx-get=/admin hx-trigger=load>{{ 7*7 }}</a>"
    )
    await site.ask(
        sample("first"),
        sample(evil[:200], evil, evil),
        sample("chat", evil, evil, [{"role": evil, "content": evil}, {"role": "user", "content": evil, evil: [evil]}]),
    )
    guest = await open_page()
    await guest.sign_in(await site.rater("ann"))
    for _ in range(2):  # the one with and the one without turns of a conversation, both swapped in by htmx
        await guest.press("1")
        assert await guest.completion() == evil
        assert await guest.page.locator(".prompt .text").first.inner_text() == evil
        await guest.page.reload()
        assert await guest.completion() == evil
    assert await guest.page.locator("main script, main img, main svg, main [hx-trigger]").count() == 0


async def test_text_that_turns_its_direction_does_not_turn_the_page(site: ServedSite, open_page: OpenPage) -> None:
    await site.ask(sample("a", "good \u202eEKAF\u2066 and\x07 on\nline two\tend"))
    guest = await open_page()
    await guest.sign_in(await site.rater("ann"))
    text = "good U+202EEKAFU+2066 andU+0007 on\nline two\tend"
    assert await guest.page.locator(".completion .text").text_content() == text
    assert await guest.page.locator(".unseen").first.get_attribute("title") == "RIGHT-TO-LEFT OVERRIDE"


async def test_a_new_completion_has_the_focus_and_is_announced(site: ServedSite, open_page: OpenPage) -> None:
    await site.ask(sample("a"), sample("b"))
    guest = await open_page()
    await guest.sign_in(await site.rater("ann"))
    await guest.page.get_by_role("button", name="4").focus()
    await guest.press("Enter")
    await expect(guest.page.locator("h1")).to_be_focused()
    await expect(guest.page.get_by_role("status")).to_have_text("Rated 4.")


async def test_nothing_else_counts_while_a_rating_is_on_the_way(site: ServedSite, open_page: OpenPage) -> None:
    await site.ask(sample("a"), sample("b"), sample("c"))
    guest = await open_page()
    await guest.sign_in(await site.rater("ann"))
    posts: list[str] = []
    guest.page.on("request", lambda request: posts.append(request.url) if request.method == "POST" else None)
    site.gate = asyncio.Event()
    await guest.page.keyboard.press("4")
    async with asyncio.timeout(10):
        await site.at_gate.wait()
    for key in "4su":
        await guest.page.keyboard.press(key)
    await guest.page.get_by_role("button", name="5").click()
    site.gate.set()
    await expect(guest.page.locator(".completion .text")).to_have_text("completion b")
    await guest.press("3")
    assert await site.ratings() == [("a", "ann", 4.0), ("b", "ann", 3.0)]
    assert len(posts) == 2


async def test_keys_do_nothing_with_a_modifier_or_while_the_help_is_open(site: ServedSite, open_page: OpenPage) -> None:
    await site.ask(sample("a"), sample("b"))
    guest = await open_page()
    await guest.sign_in(await site.rater("ann"))
    await guest.page.keyboard.press("Control+4")
    await guest.page.keyboard.press("?")
    await expect(guest.page.get_by_role("dialog", name="Keys")).to_be_visible()
    await guest.page.keyboard.press("4")
    await guest.page.keyboard.press("Escape")
    await expect(guest.page.get_by_role("dialog")).to_be_hidden()
    await guest.press("2")
    assert await site.ratings() == [("a", "ann", 2.0)]


async def test_single_keys_can_be_turned_off_for_good(site: ServedSite, open_page: OpenPage) -> None:
    await site.ask(sample("a"), sample("b"))
    guest = await open_page()
    await guest.sign_in(await site.rater("ann"))
    await guest.page.get_by_role("button", name="Keys").click()
    await guest.page.get_by_label("Rate with single keys").uncheck()
    await guest.page.get_by_role("button", name="Close").click()
    await guest.page.reload()
    await guest.page.keyboard.press("4")
    await guest.page.get_by_role("button", name="1").click()
    await expect(guest.page.locator(".completion .text")).to_have_text("completion b")
    assert await site.ratings() == [("a", "ann", 1.0)]


async def test_a_page_with_nothing_to_rate_shows_a_completion_once_there_is_one(
    site: ServedSite, open_page: OpenPage
) -> None:
    guest = await open_page()
    await guest.page.clock.install()
    await guest.sign_in(await site.rater("ann"))
    async with guest.page.expect_response("**/next") as answer:
        await guest.page.clock.run_for(5000)
    assert (await answer.value).status == 204
    await site.ask(sample("a"))
    async with guest.page.expect_response("**/next"):
        await guest.page.clock.run_for(5000)
    await expect(guest.page.locator(".completion .text")).to_have_text("completion a")
    await expect(guest.page.get_by_role("status")).to_have_text("There is a completion to rate.")


async def test_a_page_that_nobody_looks_at_takes_no_completion(site: ServedSite, open_page: OpenPage) -> None:
    guest = await open_page()
    await guest.page.clock.install()
    await guest.page.add_init_script(
        "window.away = true; Object.defineProperty(document, 'hidden', { get: () => window.away })"
    )
    await guest.sign_in(await site.rater("ann"))
    asked: list[str] = []
    guest.page.on("request", lambda request: asked.append(request.url))
    await guest.page.clock.run_for(20000)
    await guest.page.evaluate("window.away = false")
    async with guest.page.expect_response("**/next"):
        await guest.page.clock.run_for(5000)
    assert [url for url in asked if url.endswith("/next")] == [f"{site.url}/next"]


async def test_a_rating_that_did_not_arrive_can_be_given_again(site: ServedSite, open_page: OpenPage) -> None:
    await site.ask(sample("a"), sample("b"))
    guest = await open_page()
    await guest.sign_in(await site.rater("ann"))
    await site.go_down()
    await guest.page.keyboard.press("4")
    await expect(guest.page.get_by_role("alert")).to_contain_text("cannot be reached")
    await site.serve(HTMLResponse("<h1>Bad gateway</h1>", status_code=502))
    async with guest.page.expect_response("**/rating"):
        await guest.page.keyboard.press("4")
    await expect(guest.page.get_by_role("alert")).to_contain_text("cannot be reached")
    assert await guest.completion() == "completion a"
    await expect(guest.page.locator(".pressed")).to_have_count(0)  # the page takes the next key
    await site.go_down()
    await site.serve(site.app())
    await guest.press("4")
    await expect(guest.page.locator("#trouble")).to_be_hidden()
    assert await site.ratings() == [("a", "ann", 4.0)]
    guest.wrong = [text for text in guest.wrong if "Failed to load resource" not in text and "fetch" not in text]


async def test_a_completion_that_went_to_somebody_else_is_told_beside_the_next(
    site: ServedSite, open_page: OpenPage
) -> None:
    await site.ask(sample("a"), sample("b"))
    slow, quick = await open_page(), await open_page()
    await slow.sign_in(await site.rater("slow"))
    site.clock.pass_by(site.rules.lease_seconds + 1)
    await quick.sign_in(await site.rater("quick"))
    await slow.press("1")
    await expect(slow.page.locator(".problem")).to_contain_text("no longer yours")
    assert await slow.completion() == "completion b"
    assert await quick.completion() == "completion a"
    assert slow.wrong == ["Failed to load resource: the server responded with a status of 409 (Conflict)"]
    slow.wrong = []


async def test_who_was_removed_while_rating_comes_to_sign_in(site: ServedSite, open_page: OpenPage) -> None:
    await site.ask(sample("a"))
    guest = await open_page()
    await guest.sign_in(await site.rater("ann"))
    await site.store.remove_rater("ann")
    await guest.page.keyboard.press("4")
    await guest.page.wait_for_url(f"{site.url}/sign-in")
    await expect(guest.page.get_by_role("alert").first).to_have_text("You were signed out.")
    guest.wrong = [text for text in guest.wrong if "401" not in text]


async def test_everything_works_without_javascript(site: ServedSite, open_page: OpenPage) -> None:
    await site.ask(sample("a"), sample("b"), sample("c"))
    guest = await open_page(java_script_enabled=False)
    await guest.sign_in(await site.rater("ann"))
    await guest.page.get_by_role("button", name="4").click()
    await expect(guest.page.locator(".completion .text")).to_have_text("completion b")
    await expect(guest.page.locator(".notice")).to_have_text("Rated 4.")
    await guest.page.get_by_role("button", name="Skip").click()
    await expect(guest.page.locator(".completion .text")).to_have_text("completion c")
    await guest.page.get_by_role("button", name="Undo").click()
    await expect(guest.page.locator(".completion .text")).to_have_text("completion b")
    await expect(guest.page.get_by_role("button", name="Keys")).to_be_hidden()
    await guest.page.get_by_role("button", name="Sign out").click()
    await guest.page.wait_for_url(f"{site.url}/sign-in")
    assert await site.ratings() == [("a", "ann", 4.0)]


async def test_the_overview_renews_its_numbers_and_leaves_the_focus_alone(
    site: ServedSite, open_page: OpenPage
) -> None:
    guest = await open_page()
    await guest.page.clock.install()
    await guest.sign_in(await site.rater("ann", is_admin=True))
    await guest.page.goto(f"{site.url}/admin")
    waiting = guest.page.locator(".numbers div", has_text="Waiting").locator("dd")
    await expect(waiting).to_have_text("0")
    await guest.page.get_by_role("link", name="CSV").focus()
    await site.ask(sample("a"), sample("b"))
    async with guest.page.expect_response("**/admin"):
        await guest.page.clock.run_for(10000)
    await expect(waiting).to_have_text("2")
    await expect(guest.page.get_by_role("link", name="CSV")).to_be_focused()
