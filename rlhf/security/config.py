"""What a server and a client are told about security, as plain data; free of gRPC, which settings need not import."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from rlhf.addresses import is_loopback


class CredentialsError(Exception):
    """A certificate, key, token or access file that can't be used; the message says which and why, and no secret."""


@dataclass(frozen=True)
class ServerTls:
    """A server's certificate (its chain, leaf first) and key; client_ca: only callers with a certificate of these."""

    cert: Path
    key: Path
    client_ca: Path | None = None


@dataclass(frozen=True)
class ServerSecurity:
    """Over what a server is reached and by whom; without anything: in plaintext, by everybody who can connect.

    health_listen: where grpc.health.v1 alone is answered in plaintext, for probes that know no TLS.
    """

    tls: ServerTls | None = None
    access_file: Path | None = None
    health_listen: str | None = None
    max_connections: int = 1000
    receive_seconds: float = 30.0


@dataclass(frozen=True)
class ClientTls:
    """Whom a client trusts (None = the public authorities that gRPC brings), and its own certificate, if it has one.

    server_name: the name in the server's certificate where it isn't that of the address.
    """

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    server_name: str = ""


@dataclass(frozen=True)
class ClientSecurity:
    """How a client shows itself and whom it trusts; token_file: its first line is sent with every call."""

    tls: ClientTls | None = None
    token_file: Path | None = None

    def for_host(self, host: str | None) -> ClientSecurity:
        """The same for a server that was found behind the name `host`, unless another name was told."""
        if host is None or self.tls is None or self.tls.server_name:
            return self
        return replace(self, tls=replace(self.tls, server_name=host))

    def require_fit(self, target: str) -> None:
        """Raise CredentialsError where a token would travel in the clear."""
        if self.token_file is not None and self.tls is None and not is_loopback(target):
            raise CredentialsError(f"a token is sent to {target} over TLS only, and TLS is off")
