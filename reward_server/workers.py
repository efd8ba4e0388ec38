"""A few daemon threads that run blocking functions for the event loop."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class WorkerThreads:
    """Runs functions off the event loop, at most `count` at a time.

    The standard library's pool joins its threads at exit, so one hung function would keep a drained process alive
    for ever; these threads are daemons.
    """

    def __init__(self, count: int, *, name: str) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        for index in range(count):
            threading.Thread(target=self._work, name=f"{name}-{index}", daemon=True).start()

    def _work(self) -> None:
        while True:
            self._jobs.get()()

    async def run(self, function: Callable[[], T]) -> T:
        """What `function` returns, or raises. Cancelling stops the waiting; a function that has begun runs on."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[tuple[T | None, BaseException | None]] = loop.create_future()

        def deliver(value: T | None, error: BaseException | None) -> None:
            if not done.done():
                done.set_result((value, error))

        def job() -> None:
            if done.cancelled():
                return
            value: T | None = None
            error: BaseException | None = None
            try:
                value = function()
            except BaseException as raised:
                error = raised
            _call_soon(loop, deliver, value, error)

        self._jobs.put(job)
        value, error = await done
        if error is not None:
            if isinstance(error, Exception):
                raise error
            # SystemExit as itself would end the event loop.
            raise RuntimeError(f"{type(error).__name__}: {error}") from error
        return value  # type: ignore[return-value]


def _call_soon(loop: asyncio.AbstractEventLoop, *call: Any) -> None:
    try:
        loop.call_soon_threadsafe(*call)
    except RuntimeError:
        if not loop.is_closed():
            raise
