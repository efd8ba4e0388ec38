"""What an engine tells about itself while it runs; the service maps it to metrics."""

from __future__ import annotations

import enum
from typing import Protocol

from policy_server.engine.protocol import FinishReason, InFlight


class Phase(enum.Enum):
    """What tokens went through the model for."""

    PREFILL = "prefill"
    DECODE = "decode"
    SCORE = "score"


class EngineObserver(Protocol):
    """Called on the engine's thread, between forwards: implementations are quick, thread-safe and never raise."""

    def queued(self, *, generations: int, scorings: int) -> None:
        """Requests that wait: generations to start, scorings to be finished. Called after every round."""
        ...

    def running(self, *, rows: int, cache_bytes: int) -> None:
        """Completions that hold a row of a batch now, and the memory of their caches. Called after every round."""
        ...

    def tokens(self, phase: Phase, count: int) -> None:
        """`count` real tokens (no padding) went through one forward."""
        ...

    def decode_step(self, *, seconds: float, rows: int) -> None:
        """One token for each of `rows` completions took `seconds`, sampling included."""
        ...

    def finished(self, reason: FinishReason) -> None:
        """One completion ended."""
        ...

    def cancelled(self, *, completions: int) -> None:
        """A request was cancelled while `completions` of its completions were unfinished."""
        ...

    def swapped(self, in_flight: InFlight, *, seconds: float) -> None:
        """New weights are live; generation stood still for `seconds`."""
        ...


class SilentObserver:
    """An EngineObserver that listens to nothing."""

    def queued(self, *, generations: int, scorings: int) -> None:
        """Ignore it."""

    def running(self, *, rows: int, cache_bytes: int) -> None:
        """Ignore it."""

    def tokens(self, phase: Phase, count: int) -> None:
        """Ignore it."""

    def decode_step(self, *, seconds: float, rows: int) -> None:
        """Ignore it."""

    def finished(self, reason: FinishReason) -> None:
        """Ignore it."""

    def cancelled(self, *, completions: int) -> None:
        """Ignore it."""

    def swapped(self, in_flight: InFlight, *, seconds: float) -> None:
        """Ignore it."""
