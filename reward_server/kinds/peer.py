"""Another server that a reward depends on: asked again while that may help, spared while it keeps failing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field

from reward_server.kinds.breaker import CircuitBreaker, CircuitOpenError
from reward_server.results import Pending
from rlhf.channel import RetryPolicy, call_with_retry
from rlhf.failures import RpcFailure, internal, is_transient
from rlhf.logs import get_logger
from rlhf.reward_answers import MalformedAnswerError

T = TypeVar("T")
R = TypeVar("R")

_log = get_logger(__name__)

_COME_BACK_SECONDS = 2.0
_LONGEST_COME_BACK_SECONDS = 3600.0
# A call that has no time teaches nothing.
_LEAST_SECONDS = 1.0
_MALFORMED_ATTEMPTS = 4
_MALFORMED_PAUSE_SECONDS = 0.2


class PeerOptions(BaseModel):
    """How another server is asked."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    timeout: float = Field(
        default=60.0, gt=0, description="Longest that one call may take, and that a batch is tried again [seconds]"
    )
    breaker_failures: int = Field(
        default=5, ge=1, description="Failed calls in a row after which the server is not called for a while [calls]"
    )
    breaker_seconds: float = Field(
        default=10.0, gt=0, description="How long it is not called then; afterwards one call probes [seconds]"
    )


class Peer:
    """What `what` at `target` answers, or when to ask again."""

    def __init__(self, kind: str, what: str, target: str, options: PeerOptions) -> None:
        self._what = what
        self._target = target
        self._timeout = options.timeout
        self.breaker = CircuitBreaker(
            kind, target, failures=options.breaker_failures, cool_down=options.breaker_seconds
        )

    def deadline(self, answer_by: float | None) -> float:
        """The time.monotonic() until which a batch is tried: after `timeout`, or when the caller is told PENDING.

        A caller that was told so already says nothing about how long the next one waits.
        """
        now = time.monotonic()
        ends = now + self._timeout
        return ends if answer_by is None or answer_by <= now else min(ends, max(answer_by, now + _LEAST_SECONDS))

    async def ask_and_read(
        self, call: Callable[[], Awaitable[T]], read: Callable[[T], R], *, until: float
    ) -> R | Pending:
        """What `read` makes of what `ask` returns. While it raises MalformedAnswerError, the answer is asked for again.

        Raises internal when it stays malformed: what a proxy says, for instance, is nothing to judge samples by.
        """
        for attempt in range(1, _MALFORMED_ATTEMPTS + 1):
            answer = await self.ask(call, until=until)
            if isinstance(answer, Pending):
                return answer
            try:
                return read(answer)
            except MalformedAnswerError as error:
                if attempt == _MALFORMED_ATTEMPTS:
                    raise internal(f"{self._what} {self._target}: {error}") from error
                _log.warning("a malformed answer is asked for again", target=self._target, error=str(error))
                await asyncio.sleep(_MALFORMED_PAUSE_SECONDS * attempt)
        raise AssertionError("unreachable")

    async def ask(self, call: Callable[[], Awaitable[T]], *, until: float) -> T | Pending:
        """What `call` returns, made again with backoff and jitter while it fails for a reason that may pass.

        Pending once no attempt can begin before `until`, and while the server is spared. `call` ends by itself, and
        raises RpcFailure; the final ones are passed on.
        """

        async def attempt() -> T:
            with self.breaker.call():
                return await call()

        if time.monotonic() >= until:
            return Pending(_COME_BACK_SECONDS)
        try:
            return await call_with_retry(
                attempt, policy=RetryPolicy(), what=self._what, target=self._target, until=until
            )
        except CircuitOpenError as spared:
            return Pending(spared.retry_after)
        except RpcFailure as failure:
            if not is_transient(failure):
                raise
            come_back = min(max(failure.retry_after or 0.0, _COME_BACK_SECONDS), _LONGEST_COME_BACK_SECONDS)
            _log.warning(
                "a batch has to wait for another server",
                on=self._what,
                target=self._target,
                reason=str(failure),
                come_back_seconds=come_back,
            )
            return Pending(come_back)
