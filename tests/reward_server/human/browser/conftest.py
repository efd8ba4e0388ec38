"""A real browser, and the rating page served to it on a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from playwright.async_api import Browser, ConsoleMessage, Page
from starlette.types import ASGIApp, Receive, Scope, Send

from reward_server.human.page_server import PageServer
from reward_server.human.rules import Rules
from tests.reward_server.human.site import Site
from tests.support.browser import chromium

OpenPage = Callable[..., Awaitable["Guest"]]


class ServedSite(Site):
    """A site at a URL, which may go down and come back there, or have another application in its place.

    gate: while it is set to an event, ratings wait for that; `at_gate` tells that one does.
    """

    url = ""
    gate: asyncio.Event | None = None
    _server: PageServer | None = None

    async def serve(self, app: ASGIApp) -> None:
        self.at_gate = asyncio.Event()

        async def gated(scope: Scope, receive: Receive, send: Send) -> None:
            if self.gate is not None and scope["type"] == "http" and scope["path"].endswith("/rating"):
                self.at_gate.set()
                await self.gate.wait()
            await app(scope, receive, send)

        self._server = PageServer(gated, self.url.removeprefix("http://") or "127.0.0.1:0", ())
        self.url = await self._server.start()

    async def go_down(self) -> None:
        if self._server is not None:
            await self._server.stop()
        self._server = None


class Guest:
    """One person's browser: a page with cookies of its own, and all that went wrong on it."""

    def __init__(self, page: Page, url: str, *, scripts: bool = True) -> None:
        self.page = page
        self.scripts = scripts
        self.url = url
        self.wrong: list[str] = []
        page.on("console", self._heard)
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        page.on("dialog", self._asked)

    async def sign_in(self, token: str) -> None:
        await self.page.goto(f"{self.url}/sign-in")
        await self.page.get_by_label("Token").fill(token)
        await self.page.get_by_role("button", name="Sign in").click()
        await self.page.wait_for_url(f"{self.url}/")
        await self.enhanced()

    async def enhanced(self) -> None:
        """Until htmx knows what is shown: before, forms are posted as plain ones, by a navigation."""
        if self.scripts:
            await self.page.locator("#main [data-htmx-powered]").first.wait_for(state="attached")

    async def press(self, key: str) -> None:
        """Press a key that posts, until what it brings is shown and takes the next."""
        await self.enhanced()
        before = await self.page.locator("#main").element_handle()
        await self.page.keyboard.press(key)
        await self.page.wait_for_function("before => !before.isConnected", arg=before)
        await self.enhanced()

    async def completion(self) -> str:
        return await self.page.locator(".completion .text").inner_text()

    async def _asked(self, dialog: Any) -> None:
        self.wrong.append(f"dialog: {dialog.message}")
        await dialog.dismiss()

    def _heard(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.wrong.append(message.text)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def browser() -> AsyncIterator[Browser]:
    async with chromium() as browser:
        yield browser


@pytest.fixture
def rules() -> Rules:
    return Rules()


@pytest_asyncio.fixture(loop_scope="module")
async def site(tmp_path: Path, rules: Rules) -> AsyncIterator[ServedSite]:
    site = await ServedSite.open(tmp_path, rules)
    assert isinstance(site, ServedSite)
    await site.serve(site.app())
    yield site
    await site.go_down()
    await site.store.close()


@pytest_asyncio.fixture(loop_scope="module")
async def open_page(browser: Browser, site: ServedSite) -> AsyncIterator[OpenPage]:
    """`guest = await open_page(**settings of a context)`; no page may have complained when the test ends."""
    guests: list[Guest] = []

    async def open_page(**settings: Any) -> Guest:
        context = await browser.new_context(**settings)
        scripts = settings.get("java_script_enabled", True)
        guests.append(Guest(await context.new_page(), site.url, scripts=scripts))
        return guests[-1]

    yield open_page
    for guest in guests:
        await guest.page.context.close()
    assert [guest.wrong for guest in guests] == [[]] * len(guests)
