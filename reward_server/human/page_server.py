"""The page's HTTP server, on the event loop of the reward server."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator, Sequence

import uvicorn
from starlette.types import ASGIApp

from rlhf.server import BindError

_GRACE_SECONDS = 5


class PageServer:
    """Serves an application over HTTP between `start` and `stop`."""

    def __init__(self, app: ASGIApp, listen: str, trusted_proxies: Sequence[str]) -> None:
        self._listen = listen
        self._server = _Embedded(
            uvicorn.Config(
                app,
                log_config=None,
                log_level="warning",
                access_log=False,
                lifespan="off",
                ws="none",
                server_header=False,
                proxy_headers=bool(trusted_proxies),
                forwarded_allow_ips=list(trusted_proxies),
                timeout_graceful_shutdown=_GRACE_SECONDS,
            )
        )
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> str:
        """Bind and serve; the URL. Raises BindError when the address is taken, or none."""
        bound = _bind(self._listen)
        self._serving = asyncio.create_task(self._server.serve(sockets=[bound]))
        host, port = bound.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    async def stop(self) -> None:
        """Let running requests finish, for a while."""
        if self._serving is not None:
            self._server.should_exit = True
            await self._serving


class _Embedded(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the reward server's, which stops us in its turn."""
        yield


def _bind(listen: str) -> socket.socket:
    """A socket that listens already: who reads the address may connect before the server has begun."""
    host, _, port = listen.rpartition(":")
    host = host.strip("[]")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, int(port)), family=family, backlog=256)
    except (OSError, OverflowError) as error:
        raise BindError(f"the rating page can't listen on {listen}: {error}") from error
