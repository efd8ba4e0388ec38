"""How the event loop and the engine's thread talk: tasks one way, results the other."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from rlhf.failures import RpcFailure

T = TypeVar("T")
Task = Callable[[], None]


class Mailbox:
    """Tasks for the engine's thread, which sleeps while there are none."""

    def __init__(self) -> None:
        self._tasks: deque[Task] = deque()
        self._arrived = threading.Condition()

    def put(self, task: Task) -> None:
        """Add a task; from any thread."""
        with self._arrived:
            self._tasks.append(task)
            self._arrived.notify()

    def take(self, *, wait: bool) -> list[Task]:
        """All tasks there are; `wait` = until there is one."""
        with self._arrived:
            while wait and not self._tasks:
                self._arrived.wait()
            tasks = list(self._tasks)
            self._tasks.clear()
        return tasks


class Outbox:
    """Results for the event loop, handed over together: waking the loop once per token would be most of the work."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._deliveries: list[Task] = []

    def put(self, delivery: Task) -> None:
        """Run `delivery` on the event loop at the next flush."""
        self._deliveries.append(delivery)

    def resolve(self, future: asyncio.Future[T], outcome: T | RpcFailure) -> None:
        """Settle a future at the next flush, unless its owner has given up."""
        self.put(partial(_settle, future, outcome))

    def flush(self) -> None:
        """Hand everything over; what a closed loop can't take is lost with those who waited for it."""
        if not self._deliveries:
            return
        deliveries, self._deliveries = self._deliveries, []
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(_run, deliveries)


def _run(deliveries: list[Task]) -> None:
    for delivery in deliveries:
        delivery()


def _settle(future: asyncio.Future[T], outcome: T | RpcFailure) -> None:
    if future.done():
        return
    if isinstance(outcome, RpcFailure):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
