"""What the trainer waits for, and since when: nothing waits in silence."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from rlhf.channel import Waiting
from rlhf.logs import get_logger
from trainer.metrics import TrainerMetrics

_log = get_logger(__name__)

_REPEAT_SECONDS = 30.0


@dataclass
class Wait:
    """One server waited for; `calls` has when each call on it that can't succeed yet was first made (monotonic)."""

    target: str
    reason: str
    said: float
    calls: dict[object, float] = field(default_factory=dict)

    def seconds(self) -> float:
        """How long the oldest of the calls has waited."""
        return time.monotonic() - min(self.calls.values())


class WaitBoard:
    """Collects what clients report: a gauge, a line at once and every 30 seconds, and what the display shows."""

    def __init__(self, metrics: TrainerMetrics) -> None:
        self._metrics = metrics
        self._waits: dict[str, Wait] = {}

    @property
    def waits(self) -> Mapping[str, Wait]:
        """What is waited for now, by "policy" or "reward"."""
        return self._waits

    def watch(self, on: str) -> ServerWatch:
        """What the clients of server `on` ("policy" or "reward") report to."""
        return ServerWatch(self, on)

    def waiting(self, on: str, call: object, waiting: Waiting) -> None:
        """`call` on `on` can't succeed yet."""
        now = time.monotonic()
        wait = self._waits.get(on)
        first = wait is None
        if wait is None:
            wait = self._waits[on] = Wait(waiting.target, waiting.reason, said=now)
            self._metrics.waiting.labels(on=on).set(1)
        wait.target, wait.reason = waiting.target, waiting.reason
        wait.calls.setdefault(call, now - waiting.since_seconds)
        if first or now - wait.said >= _REPEAT_SECONDS:
            wait.said = now
            _log.warning(
                f"{'waiting' if first else 'still waiting'} for the {on} server",
                target=wait.target,
                reason=wait.reason,
                calls=len(wait.calls),
                seconds=round(wait.seconds()),
            )

    def over(self, on: str, call: object) -> None:
        """`call` on `on` waits no more; the wait for the server is over when none does."""
        wait = self._waits.get(on)
        if wait is None or call not in wait.calls:
            return
        seconds = wait.seconds()
        del wait.calls[call]
        if not wait.calls:
            del self._waits[on]
            self._metrics.waiting.labels(on=on).set(0)
            _log.info(f"no longer waiting for the {on} server", target=wait.target, seconds=round(seconds, 1))


@dataclass(frozen=True)
class ServerWatch:
    """The board's side of one server's clients."""

    board: WaitBoard
    on: str

    def waiting(self, call: object, waiting: Waiting) -> None:
        """`call` can't succeed yet."""
        self.board.waiting(self.on, call, waiting)

    def over(self, call: object) -> None:
        """`call` waits no more."""
        self.board.over(self.on, call)


class Patience:
    """Waits that end: nothing is said of them, but the last reason of each server is kept for whoever gives up."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.reasons: dict[str, str] = {}

    def watch(self, on: str) -> PatientWatch:
        """What the clients of server `on` ("policy" or "reward") report to."""
        return PatientWatch(self, on)


@dataclass(frozen=True)
class PatientWatch:
    """The side of one server's clients."""

    patience: Patience
    on: str

    def waiting(self, call: object, waiting: Waiting) -> None:
        """`call` can't succeed yet."""
        self.patience.reasons[self.on] = waiting.reason

    def over(self, call: object) -> None:
        """`call` waits no more."""
