"""A client's side of security: a channel that follows its certificate and token files."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import grpc

from rlhf.security.access import TOKEN_KEY
from rlhf.security.config import ClientSecurity
from rlhf.security.identities import read_tokens
from rlhf.security.reloading import Reloaded
from rlhf.security.tls import channel_credentials

# For calls that run when the certificates change: longer than any has.
_OLD_CALLS_SECONDS = 3600.0


class SecuredChannel(grpc.aio.Channel):
    """Makes each call with the files as they are then: a new connection for new certificates, the token that holds.

    Calls that run when certificates change end on the connection where they began.
    """

    def __init__(
        self, target: str, security: ClientSecurity, connect: Callable[[grpc.ChannelCredentials | None], Any]
    ) -> None:
        """`connect` makes a channel; None = without TLS. Raises CredentialsError."""
        security.require_fit(target)
        self._connect = connect
        self._credentials = None if security.tls is None else channel_credentials(security.tls)
        self._token: Reloaded[str] | None = None
        if (file := security.token_file) is not None:
            self._token = Reloaded("token", lambda: (read_tokens(file)[0], [file]))
        self._made_with = self._credentials.current() if self._credentials is not None else None
        self._channel: grpc.aio.Channel = connect(self._made_with)
        self._closing: set[asyncio.Task[None]] = set()

    def current(self) -> grpc.aio.Channel:
        """The channel for the next call."""
        if self._credentials is not None and (newest := self._credentials.current()) is not self._made_with:
            old, self._channel, self._made_with = self._channel, self._connect(newest), newest
            closing = asyncio.get_running_loop().create_task(old.close(_OLD_CALLS_SECONDS))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
        return self._channel

    def metadata(self, given: Sequence[tuple[str, str | bytes]] | None) -> list[tuple[str, str | bytes]]:
        """`given` with the token that holds now."""
        token = [(TOKEN_KEY, f"Bearer {self._token.current()}")] if self._token is not None else []
        return [*(given or ()), *token]

    async def close(self, grace: float | None = None) -> None:
        """Close it and what is left of earlier ones."""
        for closing in self._closing:
            closing.cancel()
        await asyncio.gather(*self._closing, return_exceptions=True)
        await self._channel.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """That of the current connection."""
        return self._channel.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """Of the current connection."""
        await self._channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        """Until the current connection is there."""
        await self._channel.channel_ready()

    def unary_unary(self, *arguments: Any, **named: Any) -> Any:
        """A method whose calls are secured; likewise the other three."""
        return _Method(self, "unary_unary", arguments, named)

    def unary_stream(self, *arguments: Any, **named: Any) -> Any:
        """See unary_unary."""
        return _Method(self, "unary_stream", arguments, named)

    def stream_unary(self, *arguments: Any, **named: Any) -> Any:
        """See unary_unary."""
        return _Method(self, "stream_unary", arguments, named)

    def stream_stream(self, *arguments: Any, **named: Any) -> Any:
        """See unary_unary."""
        return _Method(self, "stream_stream", arguments, named)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class _Method:
    """One RPC method of whichever channel is current."""

    def __init__(self, channel: SecuredChannel, kind: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._channel = channel
        self._kind = kind
        self._arguments = arguments
        self._named = named
        self._made: tuple[grpc.aio.Channel, Any] | None = None

    def __call__(self, *arguments: Any, metadata: Any = None, **named: Any) -> Any:
        channel = self._channel.current()
        if self._made is None or self._made[0] is not channel:
            self._made = channel, getattr(channel, self._kind)(*self._arguments, **self._named)
        return self._made[1](*arguments, metadata=self._channel.metadata(metadata), **named)
