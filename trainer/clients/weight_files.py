"""Weights as a file on storage that the policy server sees too: memory of one host, or a disk that hosts share."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from rlhf.tensors import byte_view, xxh3_64


@dataclass(frozen=True)
class WrittenWeights:
    """A folder below the root with the tensors in one file, and the xxh3_64 of each in order."""

    folder: str
    digests: tuple[int, ...]


@asynccontextmanager
async def written(root: Path, owner: str, tensors: Sequence[tuple[str, Tensor]]) -> AsyncIterator[WrittenWeights]:
    """The tensors in a new folder below `root`, until the context ends.

    What an `owner` left behind, killed in the middle, is removed first: it writes one folder at a time. Raises OSError.
    """
    prefix = hashlib.sha256(owner.encode()).hexdigest()[:16]
    folder = root / f"{prefix}-{uuid.uuid4().hex}"
    try:
        yield WrittenWeights(folder.name, await asyncio.to_thread(_write, root, prefix, folder, tensors))
    finally:
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)


def _write(root: Path, prefix: str, folder: Path, tensors: Sequence[tuple[str, Tensor]]) -> tuple[int, ...]:
    for left in root.glob(f"{prefix}-*"):
        shutil.rmtree(left, ignore_errors=True)
    whole = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors}
    folder.mkdir()
    try:
        save_file(whole, folder / "weights.safetensors")
    except SafetensorError as error:
        raise OSError(str(error)) from error
    return tuple(xxh3_64(byte_view(tensor)) for tensor in whole.values())


@asynccontextmanager
async def empty_folder(root: Path) -> AsyncIterator[str]:
    """The name of a new, empty folder below `root`, until the context ends. Raises OSError."""
    folder = root / f"empty-{uuid.uuid4().hex}"
    await asyncio.to_thread(folder.mkdir)
    try:
        yield folder.name
    finally:
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
