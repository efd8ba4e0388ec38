"""What the trainer waits for, and since when: nothing waits in silence."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from rlhf.logs import get_logger
from trainer.metrics import TrainerMetrics

_log = get_logger(__name__)

_REPEAT_SECONDS = 30.0


@dataclass
class Wait:
    """One thing waited for; `since` is time.monotonic() at the first failure."""

    target: str
    reason: str
    since: float
    said: float

    def seconds(self) -> float:
        """How long it has lasted."""
        return time.monotonic() - self.since


class WaitBoard:
    """Collects what clients report: a gauge, a line at once and every 30 seconds, and what the display shows."""

    def __init__(self, metrics: TrainerMetrics) -> None:
        self._metrics = metrics
        self._waits: dict[str, Wait] = {}

    @property
    def waits(self) -> Mapping[str, Wait]:
        """What is waited for now, by "policy" or "reward"."""
        return self._waits

    def waiting(self, on: str, target: str, reason: str) -> None:
        """A call on `on` can't succeed yet."""
        now = time.monotonic()
        wait = self._waits.get(on)
        if wait is None:
            self._waits[on] = Wait(target, reason, since=now, said=now)
            self._metrics.waiting.labels(on=on).set(1)
            _log.warning(f"waiting for the {on} server", target=target, reason=reason)
            return
        wait.reason = reason
        if now - wait.said >= _REPEAT_SECONDS:
            wait.said = now
            _log.warning(
                f"still waiting for the {on} server", target=target, reason=reason, seconds=round(wait.seconds())
            )

    def answered(self, on: str) -> None:
        """`on` answers."""
        wait = self._waits.pop(on, None)
        if wait is not None:
            self._metrics.waiting.labels(on=on).set(0)
            _log.info(f"the {on} server answers again", target=wait.target, seconds=round(wait.seconds(), 1))
