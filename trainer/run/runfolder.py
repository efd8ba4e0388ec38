"""The folder of a run: who it belongs to, how often it was started, and its append-only files."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

_IDENTITY_FILE = "run.json"
_OWN_FILES = frozenset({".lock", f".{_IDENTITY_FILE}.tmp"})


class RunFolderError(ValueError):
    """The folder can't be used for this run; the message says what to do."""


class StorageError(RuntimeError):
    """The run's folder can't be written to, because the disk is full, say; what was durable before still is."""


@dataclass(frozen=True)
class RunIdentity:
    """The run's name, and which start of its trainer this is (1 = the first)."""

    run_id: str
    incarnation: int


@contextlib.contextmanager
def lock_run_folder(folder: Path) -> Iterator[None]:
    """Hold the folder for this process; the system lets go of it when the process dies, however it dies.

    Raises RunFolderError when another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        _lock(lock, folder)
        yield


def require_free(folder: Path) -> None:
    """Raise RunFolderError when another process holds the folder, or it can't be written to; nothing is made."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        raise RunFolderError(f"{folder}: {existing} is no folder that this user may write to: give another --run-dir")
    if (folder / ".lock").exists():
        with (folder / ".lock").open("r") as lock:
            _lock(lock, folder)


def next_identity(folder: Path, *, run_id: str | None, resume: bool) -> RunIdentity:
    """Who the next start of the run in `folder` is; nothing is written.

    Raises RunFolderError when a fresh run would mix with an earlier one's files, or when the folder is another run's.
    """
    file = folder / _IDENTITY_FILE
    if file.exists():
        if not resume:
            raise RunFolderError(f"{folder} holds a run already: go on with it by --resume, or give another --run-dir")
        stored = json.loads(file.read_text(encoding="utf-8"))
        if run_id not in (None, stored["run_id"]):
            raise RunFolderError(
                f"{folder} holds run {stored['run_id']!r}, not {run_id!r}: leave out --run-id, or give another "
                "--run-dir"
            )
        return RunIdentity(stored["run_id"], stored["incarnation"] + 1)
    found = folder.iterdir() if folder.exists() else ()
    strangers = sorted(path.name for path in found if path.name not in _OWN_FILES)
    if strangers:
        raise RunFolderError(f"{folder} is not empty ({', '.join(strangers[:5])}): give another --run-dir")
    return RunIdentity(run_id or uuid.uuid4().hex[:12], 1)


def store_identity(folder: Path, identity: RunIdentity) -> None:
    """Store the incarnation durably, which must happen before its first publish.

    After a crash at version 12 and a resume at 10, the number 11 would otherwise name two sets of weights.
    """
    write_durably(folder / _IDENTITY_FILE, asdict(identity))


def write_durably(file: Path, content: Mapping[str, Any]) -> None:
    """Replace `file` by `content` as JSON; after a crash either the old or the new is there, whole."""
    replace_durably(file, json.dumps(content, indent=2).encode() + b"\n")


def replace_durably(file: Path, content: bytes) -> None:
    """Replace `file` by `content`; after a crash either the old or the new is there, whole."""
    temporary = file.with_name(f".{file.name}.tmp")
    with storing(file):
        with temporary.open("wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(file)
        sync_folder(file.parent)


@contextlib.contextmanager
def storing(file: Path, failures: tuple[type[Exception], ...] = (OSError,)) -> Iterator[None]:
    """Turn `failures`, by which the system or a library tells of a write, into a StorageError naming `file`."""
    try:
        yield
    except failures as error:
        said = error.strerror if isinstance(error, OSError) else None
        raise StorageError(f"can't write {file}: {said or error}") from error


def sync_folder(folder: Path) -> None:
    """Make the folder's entries (creations and renames in it) durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lock(file: IO[str], folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise RunFolderError(
            f"{folder}: another trainer is running in this folder; stop it, or give another --run-dir"
        ) from error


def as_line(record: Mapping[str, Any]) -> bytes:
    """One line of a .jsonl file."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"


class JsonLines:
    """One append-only file of JSON objects, cut back to a checkpoint's offset when a run is resumed."""

    def __init__(self, file: Path, *, keep_bytes: int) -> None:
        """Open `file`, keeping its first `keep_bytes` bytes: what came after them will be written again."""
        if keep_bytes > (file.stat().st_size if file.exists() else 0):
            raise RunFolderError(f"{file} is shorter than its checkpoint says: it was changed by someone else")
        self._file = file
        # Unbuffered: after a failed write nothing is left that closing would try to write again.
        self._out: io.FileIO = file.open("ab", buffering=0)
        self._out.truncate(keep_bytes)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one object; it is visible to readers at once, and durable after `sync`."""
        rest = memoryview(as_line(record))
        with storing(self._file):
            while rest:
                rest = rest[self._out.write(rest) :]

    def sync(self) -> int:
        """Make everything durable and return the offset of the end."""
        with storing(self._file):
            os.fsync(self._out.fileno())
        return self._out.seek(0, os.SEEK_END)

    def close(self) -> None:
        """Close the file."""
        self._out.close()
