"""Takes in requests so that slow or large ones can't fill the memory, nor keep other callers' requests out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from rlhf.failures import internal, unavailable

AT_ONCE = 32
AT_ONCE_OF_ONE = 8


class Receiving:
    """At most 32 requests are received at once, 8 of one caller; others wait with their bytes still on the way.

    gRPC holds a request in memory from its first byte to its last, up to max_message_bytes, however long that takes.
    So unary requests are read as streams of one message, of which nothing beyond the flow control's window is taken
    before it is asked for.
    """

    def __init__(self, seconds: float) -> None:
        """`seconds`: how long one request may take to arrive."""
        self._seconds = seconds
        self._all = asyncio.Semaphore(AT_ONCE)
        self._by_caller: dict[str, tuple[asyncio.Semaphore, int]] = {}

    async def only(self, requests: AsyncIterator[Any], caller: str) -> Any:
        """The one request of a call. Raises RpcFailure when there is none, or not in time."""
        async with self._turn(caller), self._all:
            try:
                async with asyncio.timeout(self._seconds):
                    return await anext(requests)
            except StopAsyncIteration:
                raise internal("the call ended without a request") from None
            except TimeoutError:
                raise unavailable(f"the request did not arrive within {self._seconds:g} seconds") from None
            except Exception as error:  # whatever the deserializer raises; others' mistakes don't fill our log
                raise internal(f"the request can't be decoded: {type(error).__name__}") from error

    @asynccontextmanager
    async def _turn(self, caller: str) -> AsyncIterator[None]:
        semaphore, users = self._by_caller.get(caller, (asyncio.Semaphore(AT_ONCE_OF_ONE), 0))
        self._by_caller[caller] = semaphore, users + 1
        try:
            async with semaphore:
                yield
        finally:
            _, users = self._by_caller.pop(caller)
            if users > 1:
                self._by_caller[caller] = semaphore, users - 1
