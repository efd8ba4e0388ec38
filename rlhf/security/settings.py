"""Settings of a server's TLS, access and exposure."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from rlhf.addresses import is_loopback
from rlhf.config import ServerSettings
from rlhf.security.config import ServerSecurity, ServerTls


class SecuredServerSettings(ServerSettings):
    """TLS, access and limits on clients"""

    tls_cert: Path | None = Field(
        default=None, description="The server's certificate chain (PEM), read again when it changes; unset = no TLS"
    )
    tls_key: Path | None = Field(default=None, description="Its key (PEM, not encrypted)")
    tls_client_ca: Path | None = Field(
        default=None, description="Only clients with a certificate of one of these authorities (PEM) may connect"
    )
    access_file: Path | None = Field(
        default=None,
        description="YAML file of identities with tokens, certificates, roles and quotas, read again when it changes; "
        "unset = everybody who can connect may call everything",
    )
    insecure: bool = Field(
        default=False, description="Serve an address other than loopback even without TLS and an access file"
    )
    health_listen: str | None = Field(
        default=None,
        pattern=r"^.+:\d{1,5}$",
        description="A second address, in plaintext, for grpc.health.v1 alone: probes of Kubernetes know no TLS",
        json_schema_extra={"unit": "host:port"},
    )
    max_connections: int = Field(
        default=1000, ge=1, description="Most connections at once", json_schema_extra={"unit": "connections"}
    )
    receive_seconds: float = Field(
        default=30.0,
        gt=0,
        description="How long the one request of a call may take to arrive",
        json_schema_extra={"unit": "seconds"},
    )

    @model_validator(mode="after")
    def _is_secured_or_says_not(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("tls_client_ca asks clients for certificates, which needs TLS: set tls_cert and tls_key")
        missing = [
            *(["TLS (tls_cert, tls_key)"] if self.tls_cert is None else []),
            *(["an access file (access_file)"] if self.access_file is None else []),
        ]
        if missing and not self.insecure and not is_loopback(self.listen):
            raise ValueError(
                f"listen is {self.listen}, which other machines can reach, and there is no {' and no '.join(missing)}: "
                "see docs/security.md, or say insecure where the network itself keeps strangers out"
            )
        return self

    def security(self) -> ServerSecurity:
        """For the server."""
        both = self.tls_cert is not None and self.tls_key is not None
        return ServerSecurity(
            tls=ServerTls(self.tls_cert, self.tls_key, self.tls_client_ca) if both else None,  # type: ignore[arg-type]
            access_file=self.access_file,
            health_listen=self.health_listen,
            max_connections=self.max_connections,
            receive_seconds=self.receive_seconds,
        )
