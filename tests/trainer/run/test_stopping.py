"""Signals end what waits, and leave alone what changes weights."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator

import pytest

from trainer.run.stopping import Stopped, StopSignal


@pytest.fixture
def stop() -> Iterator[StopSignal]:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    yield StopSignal()
    for number, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
async def test_a_signal_cancels_what_is_interruptible(stop: StopSignal, number: signal.Signals, code: int) -> None:
    stop.listen()
    ended = asyncio.Event()

    async def work() -> None:
        try:
            os.kill(os.getpid(), number)
            await asyncio.Event().wait()
        finally:
            ended.set()

    with pytest.raises(Stopped):
        await stop.interruptible(work())

    assert ended.is_set()
    assert stop.exit_code == code


async def test_after_a_signal_nothing_interruptible_begins(stop: StopSignal) -> None:
    stop.listen()
    began = False

    async def work() -> None:
        nonlocal began
        began = True

    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped):
        await stop.interruptible(asyncio.Event().wait())
    with pytest.raises(Stopped):
        await stop.interruptible(work())

    assert not began


async def test_without_a_signal_the_result_and_the_error_come_through(stop: StopSignal) -> None:
    async def fail() -> None:
        raise ValueError("no")

    assert await stop.interruptible(asyncio.sleep(0, "done")) == "done"
    with pytest.raises(ValueError, match="no"):
        await stop.interruptible(fail())
