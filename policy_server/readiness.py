"""Whether PolicyService serves, and if not, what it waits for."""

from __future__ import annotations

from collections.abc import Callable

from rlhf.failures import unavailable


class Readiness:
    """Waits for something, then serves for good."""

    def __init__(self, set_serving: Callable[[bool], None], *, waiting_for: str | None) -> None:
        """`set_serving` tells the health service; `waiting_for` = what is missing, None = nothing."""
        self._set_serving = set_serving
        self._waiting_for = waiting_for
        set_serving(waiting_for is None)

    def require(self) -> None:
        """Raise unavailable, saying what is waited for, unless serving."""
        if self._waiting_for is not None:
            raise unavailable(f"not serving yet: waiting for {self._waiting_for}")

    def arrived(self) -> None:
        """What was waited for is here."""
        if self._waiting_for is not None:
            self._waiting_for = None
            self._set_serving(True)
