"""How much memory there is."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch


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
