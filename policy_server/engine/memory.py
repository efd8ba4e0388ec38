"""The process's memory."""

from __future__ import annotations

import ctypes
from pathlib import Path

import psutil
import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_KEPT_BYTES = 2**30
_LARGEST_IN_HEAP = 2**25  # glibc takes no more


def keep_freed_memory() -> None:
    """Let glibc keep freed memory, up to 1 GiB, for what is allocated next, rather than give it back to the system.

    A decode step allocates and frees tens of megabytes. Memory that comes from the system is zeroed page by page first.
    With another C library nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_IN_HEAP)  # this and the next end glibc's own adjusting of both
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def free_bytes(device: torch.device, *, cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """What may still be taken of the device's memory; on a CPU also within the container's limit (cgroup v2)."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    free = int(psutil.virtual_memory().available)
    try:
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
        statistics = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such file outside of a container, "max" in one without a limit
        return free
    # Files that were read count as used until the memory is wanted for something else.
    return min(free, max(limit - used + int(statistics.get("inactive_file", 0)), 0))
