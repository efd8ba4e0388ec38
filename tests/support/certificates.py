"""Authorities and certificates of tests, as the files that processes read."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path

import trustme


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
        leaf = self._ca.issue_cert(*names, not_after=not_after)
        cert, key = folder / "cert.pem", folder / "key.pem"
        replace(cert, b"".join(pem.bytes() for pem in leaf.cert_chain_pems))
        replace(key, leaf.private_key_pem.bytes())
        return cert, key


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
