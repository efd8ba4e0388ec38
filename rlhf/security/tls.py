"""Certificates and keys from PEM files, as gRPC takes them."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from pathlib import Path

import grpc

from rlhf.metrics import CERTIFICATE_EXPIRY
from rlhf.security.config import ClientTls, CredentialsError, ServerTls
from rlhf.security.expiry import first_expiry
from rlhf.security.reloading import Reloaded


def server_credentials(tls: ServerTls) -> grpc.ServerCredentials:
    """Credentials whose every handshake is made with the files as they are then. Raises CredentialsError.

    A connection that is open stays open: it goes on under the certificates with which it began.
    """

    def load() -> tuple[grpc.ServerCertificateConfiguration, Sequence[Path]]:
        pair = _pair(tls.cert, tls.key)
        _show_expiry("server certificate", tls.cert, pair[1])
        roots = None if tls.client_ca is None else _authorities(tls.client_ca)
        files = [file for file in (tls.cert, tls.key, tls.client_ca) if file is not None]
        return grpc.ssl_server_certificate_configuration([pair], roots), files

    configuration = Reloaded("server certificate", load)
    in_use = configuration.current()

    def newest() -> grpc.ServerCertificateConfiguration | None:
        nonlocal in_use
        if configuration.current() is in_use:
            return None  # gRPC's word for no change, which spares it to make everything anew
        in_use = configuration.current()
        return in_use

    return grpc.dynamic_ssl_server_credentials(
        in_use,
        newest,  # type: ignore[arg-type]  # None is left out of its type
        require_client_authentication=tls.client_ca is not None,
    )


def channel_credentials(tls: ClientTls) -> Reloaded[grpc.ChannelCredentials]:
    """Credentials of a client; another object once the files have changed. Raises CredentialsError."""

    def load() -> tuple[grpc.ChannelCredentials, Sequence[Path]]:
        key, cert = None, None
        if tls.cert is not None and tls.key is not None:
            key, cert = _pair(tls.cert, tls.key)
            _show_expiry("client certificate", tls.cert, cert)
        roots = None if tls.ca is None else _authorities(tls.ca)
        files = [file for file in (tls.ca, tls.cert, tls.key) if file is not None]
        return grpc.ssl_channel_credentials(roots, key, cert), files

    return Reloaded("client certificate", load)


def _pair(cert: Path, key: Path) -> tuple[bytes, bytes]:
    """(key, certificate chain), which belong together."""
    key_bytes, cert_bytes = key.read_bytes(), cert.read_bytes()
    try:
        # Its own password: OpenSSL would ask for one on the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password=lambda: "")
    except ssl.SSLError as error:
        why = "they do not belong together" if error.reason == "KEY_VALUES_MISMATCH" else "not an unencrypted PEM pair"
        raise CredentialsError(f"certificate {cert} and key {key}: {why}") from error
    return key_bytes, cert_bytes


def _show_expiry(what: str, file: Path, chain: bytes) -> None:
    CERTIFICATE_EXPIRY.labels(what, str(file)).set(first_expiry(chain))


def _authorities(bundle: Path) -> bytes:
    content = bundle.read_bytes()
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=content.decode("ascii"))
    except (ssl.SSLError, ValueError) as error:
        raise CredentialsError(f"CA bundle {bundle}: holds no PEM certificates, or broken ones") from error
    return content
