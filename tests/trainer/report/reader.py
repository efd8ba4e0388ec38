"""Somebody who opens a page from a file, without a network."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Browser, Page


class Reader:
    """A page, and all that went wrong on it: complaints of the console, errors, dialogs, requests for anything else."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.wrong: list[str] = []
        page.on("console", lambda message: self.wrong.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        page.on("dialog", lambda dialog: self.wrong.append(f"dialog: {dialog.message}"))
        # "data:," is the icon, so that no browser looks for one.
        page.on("request", lambda request: request.url in (url, "data:,") or self.wrong.append(request.url))

    @classmethod
    async def open(cls, browser: Browser, path: Path, **settings: Any) -> Reader:
        context = await browser.new_context(offline=True, **settings)
        reader = cls(await context.new_page(), path.as_uri())
        await reader.page.goto(path.as_uri())
        return reader

    async def headings(self) -> list[str]:
        return await self.page.locator("h2").all_inner_texts()

    async def complaints(self) -> list[str]:
        """What axe has against the page."""
        found = (await Axe().run(self.page)).response["violations"]
        return [f"{each['id']}: {node['target']} {node['failureSummary']}" for each in found for node in each["nodes"]]


OpenReport = Callable[..., Awaitable[Reader]]
