"""Authorities and certificates of tests, as the files that processes read."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)


class Authority:
    """A CA that issues certificates into `folder`."""

    def __init__(self, folder: Path) -> None:
        self._ca = trustme.CA()
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.bundle = folder / "ca.pem"
        self.bundle.write_bytes(self.pem)

    @property
    def pem(self) -> bytes:
        """Its own certificate."""
        return self._ca.cert_pem.bytes()

    def issue(self, *names: str, into: Path | None = None, not_after: datetime | None = None) -> tuple[Path, Path]:
        """(certificate, key) for these subject alternative names, as cert.pem and key.pem in the folder `into`."""
        folder = into or self.folder / names[0].replace("/", "_").replace(":", "_")
        folder.mkdir(parents=True, exist_ok=True)
        cert, key = folder / "cert.pem", folder / "key.pem"
        if "://" in names[0]:
            replace(cert, self._of_uri(names[0], key))
            return cert, key
        leaf = self._ca.issue_cert(*names, not_after=not_after)
        replace(cert, b"".join(pem.bytes() for pem in leaf.cert_chain_pems))
        replace(key, leaf.private_key_pem.bytes())
        return cert, key

    def _of_uri(self, uri: str, key_file: Path) -> bytes:
        """A certificate for a URI, as SPIFFE has them; trustme knows only hosts and mail addresses."""
        key = ec.generate_private_key(ec.SECP256R1())
        replace(
            key_file,
            key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        )
        issuer = x509.load_pem_x509_certificate(self.pem)
        issuer_key = load_pem_private_key(self._ca.private_key_pem.bytes(), None)
        assert isinstance(issuer_key, ec.EllipticCurvePrivateKey)
        now = datetime.now(UTC)
        made = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(issuer.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)]), critical=True)
            .sign(issuer_key, hashes.SHA256())
        )
        return made.public_bytes(Encoding.PEM)


def replace(file: Path, content: bytes) -> None:
    """Put a new file in the place of the old one, as careful tools do."""
    new = file.with_name(f".{file.name}.new")
    new.write_bytes(content)
    new.replace(file)


def swap_link(link: Path, folder: Path) -> None:
    """Point `link` at another folder at once, as Kubernetes does with the folder of a Secret."""
    new = link.with_name(f".{link.name}.new")
    new.symlink_to(folder, target_is_directory=True)
    os.replace(new, link)  # noqa: PTH105 - Path.replace does the same, and reads as if it moved the folder
