"""Room on a disk, in bytes for programs and in units for people."""

from __future__ import annotations

import shutil
from pathlib import Path


def free_at(folder: Path) -> int:
    """Bytes free where `folder` lies, or will lie once it is made."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def in_units(count: float) -> str:
    """Bytes as people read them: "1.5 GB"."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
