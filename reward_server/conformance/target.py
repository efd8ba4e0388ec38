"""The server under test: where it is, and how one gets in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from reward_server.conformance.exchange import Headers
from rlhf.addresses import is_loopback


@dataclass(frozen=True)
class Target:
    """An address with its credentials; `ca` unset = the roots that gRPC brings, `cert` and `key` for mutual TLS."""

    address: str
    tls: bool = False
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    server_name: str = ""
    token: str = ""

    def open_channel(self) -> grpc.aio.Channel:
        """A channel that takes messages of every size; OSError for a file that can't be read."""
        options: list[tuple[str, Any]] = [
            ("grpc.max_send_message_length", -1),
            ("grpc.max_receive_message_length", -1),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", 1000),
            ("grpc.max_reconnect_backoff_ms", 1000),
        ]
        if is_loopback(self.address):
            # A proxy from the environment can't reach this machine's loopback.
            options.append(("grpc.enable_http_proxy", 0))
        if not self.tls:
            return grpc.aio.insecure_channel(self.address, options=options)
        if self.server_name:
            options.append(("grpc.ssl_target_name_override", self.server_name))
        credentials = grpc.ssl_channel_credentials(
            root_certificates=self.ca.read_bytes() if self.ca else None,
            private_key=self.key.read_bytes() if self.key else None,
            certificate_chain=self.cert.read_bytes() if self.cert else None,
        )
        return grpc.aio.secure_channel(self.address, credentials, options=options)

    def headers(self) -> Headers:
        """The metadata by which every call says who makes it."""
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()

    def grpcurl_flags(self) -> list[str]:
        """The same for grpcurl; the token stays in the shell's TOKEN."""
        flags = [] if self.tls else ["-plaintext"]
        for flag, value in (("-cacert", self.ca), ("-cert", self.cert), ("-key", self.key)):
            flags += [flag, str(value)] if value else []
        return flags + (["-authority", self.server_name] if self.tls and self.server_name else [])
