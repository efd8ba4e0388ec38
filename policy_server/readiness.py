"""Whether PolicyService serves, and if not, what for."""

from __future__ import annotations

from collections.abc import Callable

from rlhf.failures import unavailable


class Readiness:
    """Waits for something, serves, drains; in this order, and maybe not all of it."""

    def __init__(self, set_serving: Callable[[bool], None], *, waiting_for: str | None) -> None:
        """`set_serving` tells the health service; `waiting_for` = what is missing, None = nothing."""
        self._set_serving = set_serving
        self._waiting_for = waiting_for
        self._draining = False
        set_serving(waiting_for is None)

    def require(self) -> None:
        """Raise unavailable, saying why, unless serving."""
        self.require_not_draining()
        if self._waiting_for is not None:
            raise unavailable(f"not serving yet: waiting for {self._waiting_for}")

    def require_not_draining(self) -> None:
        """Raise unavailable once the server is going away."""
        if self._draining:
            raise unavailable("the server is draining")

    def arrived(self) -> None:
        """What was waited for is here."""
        if self._waiting_for is not None:
            self._waiting_for = None
            self._set_serving(not self._draining)

    def drain(self) -> None:
        """Take no new calls; those that run go on."""
        self._draining = True
