"""Files that change while a process runs: looked at now and then, read again as a whole, kept when the new are broken.

Kubernetes swaps a link to the folder of a Secret; other tools rename a file over the old one. Both change what `stat`
says of the path, links followed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from rlhf.logs import get_logger
from rlhf.metrics import CREDENTIALS_BROKEN, CREDENTIALS_RELOADS
from rlhf.security.config import CredentialsError

T = TypeVar("T")

LOOK_EVERY_SECONDS = 1.0

_log = get_logger(__name__)

_Signature = tuple[tuple[int, int, int, int] | None, ...]


class Reloaded(Generic[T]):
    """What `load` makes of some files, made again when they have changed; for any thread.

    load: returns the value and the files that it was made of, and raises CredentialsError or OSError. `what` names it
    in logs and metrics.
    """

    def __init__(self, what: str, load: Callable[[], tuple[T, Sequence[Path]]]) -> None:
        """Load for the first time. Raises CredentialsError."""
        self._what = what
        self._load = load
        self._lock = threading.Lock()
        try:
            self._value, self._files, self._seen = self._made(())
        except OSError as error:
            raise CredentialsError(_unreadable(error)) from error
        self._looked = time.monotonic()
        CREDENTIALS_BROKEN.labels(what).set(0)

    def current(self) -> T:
        """The newest value that could be made; looks at the files at most once a second."""
        now = time.monotonic()
        if now - self._looked >= LOOK_EVERY_SECONDS and self._lock.acquire(blocking=False):
            try:
                self._looked = now
                self._look()
            finally:
                self._lock.release()
        return self._value

    def _look(self) -> None:
        before = _signature(self._files)
        if before == self._seen:
            return
        try:
            value, files, seen = self._made(self._files)
        except (CredentialsError, OSError) as error:
            self._seen = before
            CREDENTIALS_RELOADS.labels(self._what, "failed").inc()
            CREDENTIALS_BROKEN.labels(self._what).set(1)
            why = str(error) if isinstance(error, CredentialsError) else _unreadable(error)
            _log.error(f"the new {self._what} can't be used, the old stays", why=why)
            return
        if _signature(files) != seen:
            return  # they changed while they were read, and may not belong together: looked at again
        self._value, self._files, self._seen = value, files, seen
        CREDENTIALS_RELOADS.labels(self._what, "ok").inc()
        CREDENTIALS_BROKEN.labels(self._what).set(0)
        _log.info(f"new {self._what}")

    def _made(self, files: Sequence[Path]) -> tuple[T, Sequence[Path], _Signature]:
        """The value, its files, and how they were before it was made; `files`: which they were the last time.

        What changes from then on is seen at the next look, whenever it happens.
        """
        while True:
            before = _signature(files)
            value, read = self._load()
            if read == files:
                return value, read, before
            files = read


def _signature(files: Sequence[Path]) -> _Signature:
    return tuple(_stat(file) for file in files)


def _stat(file: Path) -> tuple[int, int, int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def _unreadable(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}"
