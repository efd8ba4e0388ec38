"""A disk that is full, as far as a process can tell: no file of its may grow beyond a size."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def files_of_at_most(size: int, *, pid: int = 0) -> Iterator[None]:
    """Writes of process `pid` (0 = this one) beyond `size` bytes of a file fail, as ENOSPC would but with EFBIG.

    Python ignores the signal that comes with it, so the write fails like any other.
    """
    soft, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))
