"""Memory beside the live weights in which an update is put together, and the proof that every byte came once."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from torch import Tensor

from policy_server.manifest import ManifestEntry
from rlhf.failures import data_loss, invalid_argument
from rlhf.tensors import allocate, byte_view, xxh3_64
from rlhf.weights.v1 import weights_pb2

MAX_CHUNK_BYTES = (4 << 20) - (64 << 10)


class Coverage:
    """Which bytes of one tensor have come, and in which part."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._spans: list[tuple[int, int, int]] = []  # (start, end, part), disjoint, by start

    def claim(self, start: int, end: int, part: int) -> bool:
        """Note that bytes start..end came in `part`; False, and nothing noted, when one of them had come before."""
        at = bisect.bisect_left(self._spans, (start, start, 0))
        before = self._spans[at - 1] if at > 0 else None
        after = self._spans[at] if at < len(self._spans) else None
        if (before is not None and before[1] > start) or (after is not None and after[0] < end):
            return False
        if before is not None and before[1] == start and before[2] == part:
            start, at = before[0], at - 1
            del self._spans[at]
        if after is not None and after[0] == end and after[2] == part:
            end = after[1]
            del self._spans[at]
        self._spans.insert(at, (start, end, part))
        return True

    def release(self, part: int) -> None:
        """Forget what came in `part`."""
        self._spans = [span for span in self._spans if span[2] != part]

    def first_missing(self) -> int | None:
        """Offset of the first byte that has not come; None = all are here."""
        reached = 0
        for start, end, _ in self._spans:
            if start > reached:
                break
            reached = end
        return reached if reached < self._size else None


class Staging:
    """The tensors of one update, filled from chunks or from files.

    former: tensors of an update that is over, whose memory is taken where it fits: a system hands out new memory more
    slowly than a network fills it.
    """

    def __init__(self, entries: Sequence[ManifestEntry], former: Mapping[str, Tensor] = MappingProxyType({})) -> None:
        self.entries = tuple(entries)
        self.tensors: dict[str, Tensor] = {entry.name: _memory_for(entry, former.get(entry.name)) for entry in entries}
        self._bytes = [byte_view(self.tensors[entry.name]) for entry in entries]
        self._coverage = [Coverage(entry.size) for entry in entries]

    @property
    def size(self) -> int:
        """Bytes held."""
        return sum(entry.size for entry in self.entries)

    def write(self, chunk: weights_pb2.Chunk, part: int) -> None:
        """Put a chunk in its place. Raises invalid_argument (not there, twice, too large), data_loss (hash)."""
        if chunk.tensor >= len(self.entries):
            raise invalid_argument("chunk.tensor", f"{chunk.tensor} is beyond the {len(self.entries)} of the manifest")
        entry = self.entries[chunk.tensor]
        data = chunk.data  # each look at the field copies it
        end = chunk.offset + len(data)
        if not data or len(data) > MAX_CHUNK_BYTES:
            raise invalid_argument("chunk.data", f"must hold from 1 to {MAX_CHUNK_BYTES} bytes")
        if end > entry.size:
            raise invalid_argument(
                "chunk.offset", f"bytes {chunk.offset} to {end} are beyond the {entry.size} of {entry.name!r}"
            )
        if xxh3_64(data) != chunk.xxh3_64:
            raise data_loss(f"bytes {chunk.offset} to {end} of {entry.name!r} do not have the xxh3_64 sent with them")
        if not self._coverage[chunk.tensor].claim(chunk.offset, end, part):
            raise invalid_argument("chunk.offset", f"bytes {chunk.offset} to {end} of {entry.name!r} came before")
        self._bytes[chunk.tensor][chunk.offset : end] = data

    def release(self, part: int) -> None:
        """Forget what came in `part`: its stream was cut."""
        for coverage in self._coverage:
            coverage.release(part)

    def require_complete(self) -> None:
        """Raise invalid_argument naming the first tensor that misses a byte."""
        for entry, coverage in zip(self.entries, self._coverage, strict=True):
            missing = coverage.first_missing()
            if missing is not None:
                raise invalid_argument("chunk", f"byte {missing} of {entry.name!r} never came")

    def views(self) -> list[memoryview]:
        """The writable bytes of every tensor, by index, for a source that fills them whole."""
        return self._bytes


def _memory_for(entry: ManifestEntry, former: Tensor | None) -> Tensor:
    if former is not None and (former.dtype, tuple(former.shape)) == (entry.dtype, entry.shape):
        return former
    return allocate(entry.dtype, entry.shape)
