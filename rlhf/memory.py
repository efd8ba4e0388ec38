"""The process's memory."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # of glibc's malloc.h
_LARGEST_IN_HEAP = 2**25  # glibc takes no more
_MOST = 2**31 - 1  # an int of C


def keep_freed_memory(limit: int = _MOST, *, of_any_size: bool = True) -> None:
    """Let glibc keep freed memory, up to `limit` bytes, for what is allocated next, and not give it back to the system.

    A decode step, or a mini-batch, allocates and frees tens of megabytes and more, and memory that comes from the
    system is zeroed page by page first. of_any_size: blocks of more than 32 MiB too, each of which is otherwise the
    system's own. With another C library nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    # Either of these, and the last, end glibc's own adjusting of both thresholds.
    if of_any_size:
        mallopt(_M_MMAP_MAX, 0)
    else:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_IN_HEAP)
    mallopt(_M_TRIM_THRESHOLD, limit)
