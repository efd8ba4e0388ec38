"""A circuit breaker: a server that keeps failing is left alone for a while, instead of being asked by every sample."""

from __future__ import annotations

import contextlib
import enum
import time
from collections.abc import Iterator

from reward_server import metrics
from rlhf.failures import RpcFailure, is_transient
from rlhf.logs import get_logger

_log = get_logger(__name__)

_WHILE_PROBED_SECONDS = 1.0


class CircuitOpenError(Exception):
    """The call was not made; worth asking again after `retry_after` seconds."""

    def __init__(self, retry_after: float) -> None:
        super().__init__(f"not called for {retry_after:.1f} s, since it kept failing")
        self.retry_after = max(retry_after, 0.001)


class Circuit(enum.IntEnum):
    """Whether calls are made; the values are those of the metric."""

    CLOSED = 0
    HALF_OPEN = 1
    OPEN = 2


class CircuitBreaker:
    """Opens after `failures` failed calls in a row, for `cool_down` seconds; then one call probes, and closes it.

    A failure that says when to come back comes from a server that is alive, and does not count.
    """

    def __init__(self, kind: str, target: str, *, failures: int, cool_down: float) -> None:
        self._target = target
        self._limit = failures
        self._cool_down = cool_down
        self._failed_in_a_row = 0
        self._open_until = 0.0
        self._gauge = metrics.CIRCUIT_STATE.labels(kind, target)
        self._enter(Circuit.CLOSED)

    @property
    def state(self) -> Circuit:
        """OPEN until the next call after the cool-down."""
        return self._state

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """Around one call, which tells by an RpcFailure that it failed.

        Raises CircuitOpenError in place of the call, and in place of the failure that opens the circuit.
        """
        probes = self._admit()
        try:
            yield
        except RpcFailure as failure:
            if is_transient(failure) and failure.retry_after is None:
                self._failed(str(failure))
                if self._state is Circuit.OPEN:
                    raise CircuitOpenError(self._open_until - time.monotonic()) from failure
            else:
                self._answered()
            raise
        except BaseException:
            # Given up by us, so nothing was learnt: the next call probes in its place.
            if probes and self._state is Circuit.HALF_OPEN:
                self._enter(Circuit.OPEN)
            raise
        self._answered()

    def _admit(self) -> bool:
        """Whether the call that may be made now is the probe."""
        if self._state is Circuit.CLOSED:
            return False
        if self._state is Circuit.HALF_OPEN:
            raise CircuitOpenError(min(_WHILE_PROBED_SECONDS, self._cool_down))
        if (remaining := self._open_until - time.monotonic()) > 0:
            raise CircuitOpenError(remaining)
        self._enter(Circuit.HALF_OPEN)
        return True

    def _failed(self, reason: str) -> None:
        self._failed_in_a_row += 1
        # Calls that had begun before it opened do not prolong it.
        if self._failed_in_a_row >= self._limit and self._state is not Circuit.OPEN:
            self._open_until = time.monotonic() + self._cool_down
            self._enter(Circuit.OPEN)
            _log.warning(
                "a server that keeps failing is not called for a while",
                target=self._target,
                failed_in_a_row=self._failed_in_a_row,
                seconds=self._cool_down,
                reason=reason,
            )

    def _answered(self) -> None:
        self._failed_in_a_row = 0
        if self._state is not Circuit.CLOSED:
            self._enter(Circuit.CLOSED)
            _log.info("a server that kept failing answers again", target=self._target)

    def _enter(self, state: Circuit) -> None:
        self._state = state
        self._gauge.set(state)
