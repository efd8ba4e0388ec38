"""Weights from safetensors files on shared storage, below one root that the operator has named.

The files are read by plain reads into staging memory, never mapped: a mapped file that another process shortens kills
the reader with SIGBUS, and a mapping would read the file again after the answer.
"""

from __future__ import annotations

import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from policy_server.manifest import ManifestEntry
from policy_server.staging import Staging
from rlhf.failures import RpcFailure, data_loss, invalid_argument, permission_denied
from rlhf.tensors import dtype_name, xxh3_64

_FIELD = "begin.directory.path"
_READERS = 4  # reading and hashing leave the interpreter free
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit


@dataclass(frozen=True)
class _Place:
    """Where in a file a tensor lies, and what the file says it is."""

    file: Path
    start: int
    end: int
    dtype: str
    shape: tuple[int, ...]


def resolve_below(root: Path | None, relative: str) -> Path:
    """The directory that `relative` names below `root`.

    Raises permission_denied for no root, an absolute path, "..", or a link that leads out; invalid_argument for what
    is no directory.
    """
    if root is None:
        raise permission_denied("this server reads no directories: it was started without --weights-root")
    path = PurePosixPath(relative)
    if path.is_absolute() or ".." in path.parts:
        raise permission_denied("begin.directory.path must be relative to the weights root and free of '..'")
    if not relative or "\0" in relative:
        raise invalid_argument(_FIELD, "must name a directory")
    folder = _inside(root, root / path)
    if not os.path.isdir(folder):  # noqa: PTH112 - unlike Path.is_dir, False for a name too long
        raise invalid_argument(_FIELD, f"no directory {relative[:200]!r} below the weights root")
    return folder


def fill_from_directory(staging: Staging, root: Path, folder: Path) -> None:
    """Read every tensor of `staging` from the safetensors files in `folder`, several at once; blocks.

    Raises invalid_argument for a tensor that is missing, in two files, or of another dtype or shape than the manifest
    says; data_loss for bytes without the hash of the manifest; permission_denied for a link out of `root`.
    """
    places: dict[str, _Place] = {}
    for listed in sorted(folder.glob("*.safetensors")):
        file = _inside(root, listed)
        for name, place in _read_header(file).items():
            if name in places:
                raise invalid_argument(_FIELD, f"{name[:200]!r} is in two files")
            places[name] = place
    for entry in staging.entries:
        if entry.name not in places:
            raise invalid_argument(_FIELD, f"no file holds {entry.name!r}")
    with ThreadPoolExecutor(min(_READERS, os.cpu_count() or 1)) as readers:
        read = [
            readers.submit(_read_tensor, places[entry.name], entry, view)
            for entry, view in zip(staging.entries, staging.views(), strict=True)
        ]
        try:
            for tensor in read:
                tensor.result()
        except RpcFailure:
            readers.shutdown(cancel_futures=True)
            raise


def _inside(root: Path, path: Path) -> Path:
    """`path` with its links followed, when that is below `root`."""
    try:
        resolved = path.resolve()
    except (OSError, RuntimeError) as error:  # a loop of links, a name too long
        raise invalid_argument(_FIELD, "can't be followed") from error
    if not resolved.is_relative_to(root.resolve()):
        raise permission_denied("begin.directory.path leads out of the weights root")
    return resolved


def _read_tensor(place: _Place, entry: ManifestEntry, view: memoryview) -> None:
    if place.dtype != dtype_name(entry.dtype) or place.shape != entry.shape:
        raise invalid_argument(
            _FIELD, f"{entry.name!r} is {place.dtype} {place.shape} in its file, not what the manifest says"
        )
    if place.end - place.start != entry.size:
        raise data_loss(f"the file of {entry.name!r} gives it {place.end - place.start} bytes, not {entry.size}")
    try:
        with place.file.open("rb", buffering=0) as file:
            file.seek(place.start)
            filled = 0
            while filled < len(view):
                count = file.readinto(view[filled:])
                if not count:
                    raise data_loss(f"the file of {entry.name!r} ends before it does")
                filled += count
    except OSError as error:
        raise data_loss(f"the file of {entry.name!r} can't be read: {error.strerror}") from error
    if xxh3_64(view) != entry.digest:
        raise data_loss(f"{entry.name!r} in its file does not have the xxh3_64 of the manifest")


def _read_header(file: Path) -> dict[str, _Place]:
    try:
        with file.open("rb") as opened:
            header, data_start = _header_of(opened)
    except (OSError, ValueError, RecursionError) as error:
        raise data_loss(f"{file.name} is no readable safetensors file") from error
    places = {}
    for name, described in header.items():
        if name == "__metadata__":
            continue
        try:
            start, end = (int(offset) for offset in described["data_offsets"])
            shape = tuple(int(extent) for extent in described["shape"])
            dtype = str(described["dtype"])
        except (KeyError, TypeError, ValueError) as error:
            raise data_loss(f"{file.name} is no readable safetensors file") from error
        if start < 0 or end < start or math.prod(shape) < 0:
            raise data_loss(f"{file.name} is no readable safetensors file")
        places[name] = _Place(file, data_start + start, data_start + end, dtype, shape)
    return places


def _header_of(file: BinaryIO) -> tuple[dict[str, Any], int]:
    """The JSON header (8 bytes of little-endian length, then that many of JSON) and where the data begin."""
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= _MAX_HEADER_BYTES:
        raise ValueError("no header")
    header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("no header")
    return header, 8 + length
