"""The event loop's ends of what the engine's thread produces."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from policy_server.engine.protocol import TokenDelta
from rlhf.failures import RpcFailure

StreamItems = asyncio.Queue[TokenDelta | RpcFailure | None]


class DeltaStream:
    """A TokenStream over a queue: deltas, then a failure or (None) the orderly end.

    `cancel` is called once if the consumer leaves before the end. The engine knows the queue only, so that a stream
    that is simply dropped is collected, and cancels.
    """

    def __init__(self, items: StreamItems, cancel: Callable[[], None]) -> None:
        self._items = items
        self._cancel: Callable[[], None] | None = cancel

    def __aiter__(self) -> DeltaStream:
        return self

    async def __anext__(self) -> TokenDelta:
        if self._cancel is None:
            raise StopAsyncIteration
        try:
            item = await self._items.get()
        except asyncio.CancelledError:
            self._leave()
            raise
        if isinstance(item, TokenDelta):
            return item
        self._cancel = None
        if item is None:
            raise StopAsyncIteration
        raise item

    async def aclose(self) -> None:
        """Cancel the request if it has not finished; safe to call at any time."""
        self._leave()

    def __del__(self) -> None:
        self._leave()

    def _leave(self) -> None:
        cancel, self._cancel = self._cancel, None
        if cancel is not None:
            cancel()
