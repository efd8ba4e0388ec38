"""How often one caller may do a thing."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable


class RateLimit:
    """Token buckets, one for each key: `per_minute` at once, and then as many a minute.

    They live in this process: with n replicas a caller who reaches them all has n times as much.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._size = per_minute
        self._clock = clock
        self._buckets: dict[Hashable, tuple[float, float]] = {}
        self._cleaned = clock()

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, key: Hashable) -> int:
        """0 when it may be done now; else the whole seconds to wait, and nothing is taken."""
        now = self._clock()
        self._forget_full(now)
        level = self._level(key, now)
        if level < 1:
            return math.ceil((1 - level) * 60 / self._size)
        self._buckets[key] = (level - 1, now)
        return 0

    def _level(self, key: Hashable, now: float) -> float:
        level, then = self._buckets.get(key, (self._size, now))
        return min(self._size, level + (now - then) * self._size / 60)

    def _forget_full(self, now: float) -> None:
        # A bucket is full again after a minute, so that what is kept is bounded by a minute's or two's callers.
        if now - self._cleaned >= 60:
            self._cleaned = now
            self._buckets = {key: bucket for key, bucket in self._buckets.items() if now - bucket[1] < 60}
