"""A token bucket: so many units a second, and as many at once as have gathered."""

from __future__ import annotations

import time
from collections.abc import Callable


class Bucket:
    """Holds at most `burst` units and gains `per_second`; full at the start. Of one thread."""

    def __init__(self, per_second: float, burst: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_second = per_second
        self._burst = burst
        self._clock = clock
        self._units = burst
        self._at = clock()

    def set_rate(self, per_second: float, burst: float) -> None:
        """Go on at another rate with what is there."""
        self._gain()
        self._per_second, self._burst = per_second, burst
        self._units = min(self._units, burst)

    def take(self, units: float) -> float:
        """Take units: 0, or the seconds until they are there, and nothing was taken.

        More than ever fit are taken from a full bucket, which then owes them.
        """
        self._gain()
        wanted = min(units, self._burst)
        if self._units < wanted:
            return (wanted - self._units) / self._per_second
        self._units -= units
        return 0.0

    def give_back(self, units: float) -> None:
        """Put back what was taken and not used."""
        self._gain()
        self._units = min(self._burst, self._units + units)

    def _gain(self) -> None:
        now = self._clock()
        self._units = min(self._burst, self._units + (now - self._at) * self._per_second)
        self._at = now
