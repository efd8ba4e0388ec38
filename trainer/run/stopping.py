"""SIGTERM and SIGINT: abandon what waits, finish what changes weights, and leave a checkpoint behind."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Coroutine
from typing import Any, TypeVar

from rlhf.logs import get_logger

_log = get_logger(__name__)

T = TypeVar("T")


class Stopped(Exception):  # noqa: N818 - not an error: someone asked for it
    """The run was asked to stop, between two changes of the weights."""


class StopSignal:
    """Listens for SIGTERM and SIGINT: the first cancels what is `interruptible`, the second ends the process."""

    def __init__(self) -> None:
        self._number: signal.Signals | None = None
        self._current: asyncio.Task[Any] | None = None

    def listen(self) -> None:
        """Install the handlers on the running loop."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._received, number)

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self._number is not None

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as a shell reports it: 143 for SIGTERM. A Job that exits 0 counts as complete."""
        assert self._number is not None
        return 128 + self._number

    async def interruptible(self, work: Coroutine[Any, Any, T]) -> T:
        """The work's result, or Stopped as soon as a signal comes; the work is cancelled then."""
        self._current = asyncio.create_task(work)
        if self.requested:
            self._current.cancel()
        try:
            result: T = await self._current
            return result
        except asyncio.CancelledError:
            if self.requested:
                raise Stopped from None
            raise
        finally:
            self._current = None

    def _received(self, number: signal.Signals) -> None:
        if self.requested:
            os._exit(128 + number)
        self._number = number
        _log.info(f"{number.name}: stopping at the next step boundary; once more ends at once")
        if self._current is not None:
            self._current.cancel()
