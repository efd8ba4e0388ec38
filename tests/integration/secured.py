"""Servers behind mutual TLS and an access file, and clients of each role."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc

from tests.support.certificates import Authority, replace
from tests.support.processes import ProcessUnderTest, StartProcess

ROLES = ("app", "rollout", "scorer", "writer", "admin")


def token_of(role: str) -> str:
    """The token of the identity that has this role alone."""
    return f"the-token-of-{role}-0123456789"


def access_file(folder: Path, *more: str) -> Path:
    """One identity for each role, with a token; `more` lines behind them."""
    lines = []
    for role in ROLES:
        digest = hashlib.sha256(token_of(role).encode()).hexdigest()
        lines += [f"the-{role}:", f"  roles: [{role}]", f"  token_sha256: [{digest}]"]
    file = folder / "access.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    replace(file, "\n".join([*lines, *more, ""]).encode())
    return file


class Guarded:
    """A folder of credentials, and servers and clients that use them."""

    def __init__(self, folder: Path, start: StartProcess) -> None:
        self.folder = folder
        self.authority = Authority(folder / "authority")
        self.clients = Authority(folder / "clients")
        self.cert, self.key = self.authority.issue("localhost", "127.0.0.1")
        self.client_cert, self.client_key = self.clients.issue("client.example")
        self.access = access_file(folder)
        self._start = start

    def server(self, module: str, *flags: str, **arguments: Any) -> ProcessUnderTest:
        """`python -m module` with mutual TLS, the access file and a plaintext address for health."""
        return self._start(module, *flags, *self.flags(), **arguments)

    def flags(self) -> list[str]:
        """What every server here is told."""
        return [
            *("--tls-cert", str(self.cert), "--tls-key", str(self.key)),
            *("--tls-client-ca", str(self.clients.bundle)),
            *("--access-file", str(self.access), "--health-listen", "127.0.0.1:0"),
        ]

    @contextmanager
    def channel(
        self,
        server: ProcessUnderTest,
        *,
        trusts: Authority | None = None,
        pair: tuple[Path, Path] | None = None,
        options: tuple[tuple[str, Any], ...] = (),
    ) -> Iterator[grpc.Channel]:
        """A connection of a client with a certificate; `pair` = another one."""
        cert, key = pair or (self.client_cert, self.client_key)
        credentials = grpc.ssl_channel_credentials((trusts or self.authority).pem, key.read_bytes(), cert.read_bytes())
        # Each its own connection: gRPC shares those of equal channels.
        local = (("grpc.use_local_subchannel_pool", 1), *options)
        with grpc.secure_channel(server.address, credentials, options=local) as channel:
            yield channel


def bearer(token: str | None) -> tuple[tuple[str, str], ...]:
    """The metadata that carry a token; None = none."""
    return () if token is None else (("authorization", f"Bearer {token}"),)


def code_of(call: Any, request: Any, token: str | None, **arguments: Any) -> str:
    """The status code of a call with this token."""
    try:
        answer = call(request, metadata=bearer(token), timeout=20, **arguments)
        if not hasattr(answer, "ListFields"):
            list(answer)
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"
