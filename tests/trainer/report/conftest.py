"""A real browser that opens the pages of runs as files."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest_asyncio
from playwright.async_api import Browser

from tests.support.browser import chromium
from tests.trainer.report.reader import OpenReport, Reader


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def browser() -> AsyncIterator[Browser]:
    async with chromium() as browser:
        yield browser


@pytest_asyncio.fixture(loop_scope="module")
async def open_report(browser: Browser) -> AsyncIterator[OpenReport]:
    """`reader = await open_report(path, **settings of a context)`; when the test ends, none may have had trouble."""
    readers: list[Reader] = []

    async def open_report(path: Path, **settings: Any) -> Reader:
        readers.append(await Reader.open(browser, path, **settings))
        return readers[-1]

    yield open_report
    for reader in readers:
        await reader.page.context.close()
    assert [reader.wrong for reader in readers] == [[]] * len(readers)
