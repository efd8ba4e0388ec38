"""Small operators on one thread: to wake another one takes as long as they do."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

_WORTH_WAKING = 2**22
"""Multiplications: about 40 µs of a thread that is awake. Decoding 4.7 M parameters gains from 2**21 to 2**23 alike."""

_spared = threading.local()


@contextlib.contextmanager
def sparing_threads() -> Iterator[None]:
    """Within, operators that this thread calls run on it alone, but for what is worth others: see `waking_for`."""
    threads = torch.get_num_threads()
    _spared.threads = threads
    torch.set_num_threads(1)
    try:
        yield
    finally:
        _spared.threads = 1
        torch.set_num_threads(threads)


@contextlib.contextmanager
def waking_for(multiplications: int) -> Iterator[None]:
    """Within, operators run on the threads that `sparing_threads` spares, if so much work is worth them."""
    threads = getattr(_spared, "threads", 1)
    if threads == 1 or multiplications < _WORTH_WAKING:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(1)
