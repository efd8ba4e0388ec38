"""What the clients tell about calls that can't succeed yet, each call by itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Protocol

from rlhf.channel import OnWait, Waiting


class CallWatch(Protocol):
    """Learns of the calls on one server that are waited for; calls are told apart by identity."""

    def waiting(self, call: object, waiting: Waiting) -> None:
        """`call` can't succeed yet."""
        ...

    def over(self, call: object) -> None:
        """`call` was answered, refused or given up; told of calls that never waited, too."""
        ...


@contextlib.contextmanager
def watched(watch: CallWatch | None) -> Iterator[OnWait | None]:
    """One call, with all its attempts: what its `on_wait` shall be. None = plain log lines."""
    if watch is None:
        yield None
        return
    call = object()
    try:
        yield partial(watch.waiting, call)
    finally:
        watch.over(call)
