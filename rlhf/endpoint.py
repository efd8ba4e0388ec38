"""The endpoint file: how whoever starts a process with ports that the OS picks learns which they are."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path


def write_endpoint_file(
    path: Path, *, address: str | None, metrics_url: str | None, health_address: str | None = None
) -> None:
    """Write {"pid", "address", "metrics_url", "health_address"} as JSON, at once and whole; null = there is none."""
    content = json.dumps(
        {"pid": os.getpid(), "address": address, "metrics_url": metrics_url, "health_address": health_address}
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        file.write(content + "\n")
    Path(file.name).replace(path)
