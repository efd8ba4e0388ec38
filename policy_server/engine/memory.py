"""The process's memory."""

from __future__ import annotations

import ctypes

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
