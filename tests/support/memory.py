"""What a process holds, for tests that it doesn't grow."""

from __future__ import annotations

import psutil


def private_bytes(pid: int | None = None) -> int:
    """Resident memory of a process (None = this one) but for shared pages.

    Those are mostly libraries': a machine short of memory drops them and reads them again, which is no growth.
    """
    held = psutil.Process(pid).memory_info()
    return int(held.rss - held.shared)
