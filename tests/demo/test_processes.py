from __future__ import annotations

import asyncio
import io
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from rich.console import Console

from demo.__main__ import _endpoint
from demo.processes import Child, ProcessDiedError, first_to_end, stop_all

Start = Callable[[str], Awaitable[Child]]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    children: list[Child] = []

    async def starts(behaviour: str) -> Child:
        folder = tmp_path / str(len(children))
        folder.mkdir()
        child = await Child.start("tests.demo.a_process", [behaviour], folder=folder, environment=os.environ)
        children.append(child)
        return child

    yield starts
    await stop_all([child for child in children if child.running], 0.1)


async def test_a_process_tells_where_it_listens(start: Start) -> None:
    child = await start("listens")
    endpoint = await child.endpoint()
    assert endpoint.pid == child.pid
    assert endpoint.port == 5001
    assert child.running


async def test_a_process_that_fails_early_is_reported_with_the_end_of_its_log(start: Start) -> None:
    child = await start("fails-early")
    with pytest.raises(ProcessDiedError) as died:
        await child.endpoint()
    assert "exit status 1" in str(died.value)
    assert "something is missing" in str(died.value)


async def test_a_process_that_is_slow_to_listen_is_waited_for_and_named_meanwhile(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("demo.__main__._SILENCE_SECONDS", 0.05)
    shown = io.StringIO()
    child = await start("stays-silent")
    waiting = asyncio.create_task(_endpoint(child, [child], Console(file=shown)))
    async with asyncio.timeout(10):
        while shown.getvalue().count("waiting for tests.demo.a_process") < 2:  # noqa: ASYNC110 - nobody tells it
            await asyncio.sleep(0.01)
    assert not waiting.done()
    await child.stop(0.1)
    with pytest.raises(ProcessDiedError, match="was ended by"):
        await waiting


async def test_the_one_that_dies_is_found_among_those_that_run(start: Start) -> None:
    steady = await start("listens")
    dying = await start("dies")
    ended = await first_to_end([steady, dying])
    assert ended is dying
    assert "SIGKILL" in ended.epitaph()
    assert steady.running


async def test_a_process_that_ignores_sigterm_is_killed_after_the_grace(start: Start) -> None:
    stubborn = await start("ignores-sigterm")
    await stubborn.endpoint()
    began = time.monotonic()
    await stop_all([stubborn], 0.5)
    assert time.monotonic() - began < 10
    assert not stubborn.running
    assert await stubborn.wait() == -9


async def test_a_program_of_another_make_says_in_its_log_where_it_listens(tmp_path: Path) -> None:
    script = 'echo starting; echo "listening on 127.0.0.1:5002"; exec sleep 60'
    child = await Child.start_program("other", ["sh", "-c", script], folder=tmp_path, environment=os.environ)
    try:
        async with asyncio.timeout(10):
            endpoint = await child.endpoint()
        assert (endpoint.pid, endpoint.address, endpoint.metrics_url) == (child.pid, "127.0.0.1:5002", None)
    finally:
        await child.stop(0.1)
