"""Where the policy servers are: addresses that stay, and names whose addresses come and go."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Awaitable, Callable, Sequence

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]

_NAME = re.compile(r"dns:///(?P<host>[^:/]+):(?P<port>\d+)")


async def resolved(host: str, port: int) -> list[str]:
    """Every address behind a name as "address:port", sorted; IPv4 alone where there is any, since a server has both.

    Raises OSError when the name has none.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    version_4 = {f"{address[0]}:{port}" for family, *_, address in found if family is socket.AF_INET}
    return sorted(version_4 or {f"[{address[0]}]:{port}" for *_, address in found})


class Discovery:
    """The targets of all replicas, each of them one server."""

    def __init__(self, servers: Sequence[str], *, resolve: Resolve = resolved) -> None:
        """`servers`: what --policy-server takes, "host:port", "unix:path", or "dns:///host:port" for every address."""
        self._servers = servers
        self._resolve = resolve

    @property
    def changes(self) -> bool:
        """Whether looking again may find others."""
        return any(_NAME.fullmatch(server) for server in self._servers)

    @property
    def several(self) -> bool:
        """Whether there may be more than one replica."""
        return self.changes or len(set(self._servers)) > 1

    async def targets(self) -> list[str]:
        """All there are now, each once. Raises OSError, naming the name, when a name has no address."""
        found: list[str] = []
        for server in self._servers:
            name = _NAME.fullmatch(server)
            if name is None:
                found.append(server)
                continue
            try:
                found += await self._resolve(name["host"], int(name["port"]))
            except OSError as error:
                raise OSError(f"{server}: {error.strerror or error}") from error
        return list(dict.fromkeys(found))

    def __str__(self) -> str:
        return ", ".join(self._servers)
