"""The book of weight updates: which one is being put together, and what became of those before it."""

from __future__ import annotations

import asyncio
import enum
import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from policy_server import metrics
from policy_server.engine.protocol import InFlight, WeightsVersion
from policy_server.manifest import ManifestEntry
from policy_server.staging import Staging
from rlhf.failures import aborted, invalid_argument, overloaded

# Far beyond what a writer may still repeat; a still older update is refused as stale by its version all the same.
_REMEMBERED_UPDATES = 10_000


class UpdateState(enum.Enum):
    """The fate of an update; the names are the contract's."""

    STAGING = "staging"
    APPLIED = "applied"
    FAILED = "failed"


@dataclass(frozen=True)
class Opening:
    """A Begin that was checked. `content` = digest of what every stream of the update must repeat."""

    update_id: str
    version: WeightsVersion
    if_current: WeightsVersion | None
    partial: bool
    in_flight: InFlight
    total_bytes: int
    folder: Path | None
    part: int
    part_count: int
    content: bytes


@dataclass(eq=False)
class PartStream:
    """One stream that sends a part; `replaced` = the writer began the part anew in another stream."""

    part: int
    replaced: bool = False


@dataclass(eq=False)
class Update:
    """One update, from its first stream to its end and as a memory after it."""

    opening: Opening
    former: Mapping[str, Tensor] = field(default_factory=dict)
    """Memory of an update that is over."""
    state: UpdateState = UpdateState.STAGING
    manifest: bytes | None = None
    staging: Staging | None = None
    streams: dict[int, PartStream] = field(default_factory=dict)  # by part: the stream that sends it now
    stored_parts: set[int] = field(default_factory=set)
    swap: asyncio.Task[None] | None = None
    called_off: bool = False  # its caller went away while it was being swapped in

    @property
    def whole(self) -> bool:
        """Every part is stored."""
        return len(self.stored_parts) == self.opening.part_count

    def has(self, part: int) -> bool:
        """This part is stored already, or the whole update is over."""
        return self.state is not UpdateState.STAGING or part in self.stored_parts

    def release(self, part: int) -> None:
        """Forget what came in a part."""
        if self.staging is not None:
            self.staging.release(part)

    def adopt(self, entries: tuple[ManifestEntry, ...]) -> None:
        """Take the manifest of a stream: the first makes the staging memory, the others must repeat it."""
        digest = hashlib.sha256(repr(entries).encode()).digest()
        if self.manifest is None:
            self.manifest = digest
        elif self.manifest != digest:
            field = "manifest" if self.state is UpdateState.STAGING else "begin.update_id"
            raise invalid_argument(field, f"not the manifest that update {self.opening.update_id!r} had before")
        if self.state is UpdateState.STAGING and self.staging is None:
            try:
                self.staging = Staging(entries, self.former)
            except (MemoryError, RuntimeError) as error:  # torch's allocator raises RuntimeError
                raise overloaded("no memory to stage the update now", retry_after=5.0) from error
            self.former = {}
            metrics.STAGED_BYTES.set(self.staging.size)


class UpdateBook:
    """At most one update is staged at a time; those that ended are remembered without their tensors.

    keep_staging: hold on to the memory of an update for the next one.
    """

    def __init__(self, *, keep_staging: bool = True) -> None:
        self._keep_staging = keep_staging
        self._spare: Mapping[str, Tensor] = {}
        self._current: Update | None = None
        self._updates: OrderedDict[str, Update] = OrderedDict()

    def find(self, update_id: str) -> Update | None:
        """The update of this id, if this process has seen it."""
        return self._updates.get(update_id)

    def enter(self, opening: Opening, stream: PartStream) -> Update:
        """The update that a stream of `opening` belongs to: one that is staged, a new one, or one that was applied.

        Raises invalid_argument when the id was used for something else, aborted UPDATE_IN_PROGRESS while another
        update has open streams.
        """
        update = self._updates.get(opening.update_id)
        if update is not None and update.state is not UpdateState.FAILED:
            if update.opening.content != opening.content:
                raise invalid_argument("begin.update_id", f"update {opening.update_id!r} began with something else")
        else:
            self._make_way(opening)
            update = self._current = self._updates[opening.update_id] = Update(opening, self._spare)
            self._spare = {}
            self._updates.move_to_end(opening.update_id)
            while len(self._updates) > _REMEMBERED_UPDATES:
                self._updates.popitem(last=False)
        if not update.has(stream.part):
            if stream.part in update.streams:
                update.streams[stream.part].replaced = True
                update.release(stream.part)
            update.streams[stream.part] = stream
        return update

    def leave(self, update: Update, stream: PartStream) -> None:
        """A stream ended without commit: what it sent is forgotten, and the update too when nothing else holds it."""
        if update.streams.get(stream.part) is not stream:
            return
        del update.streams[stream.part]
        update.release(stream.part)
        if not update.streams and not update.stored_parts:
            self.end(update, UpdateState.FAILED)

    def store(self, update: Update, part: int) -> None:
        """A part was committed."""
        update.streams.pop(part, None)
        update.stored_parts.add(part)

    def end(self, update: Update, state: UpdateState) -> None:
        """The update is over: only its fate is kept."""
        update.state = state
        if self._keep_staging and (state is UpdateState.APPLIED or update.swap is None):  # nobody reads it any more
            self._spare = update.former if update.staging is None else update.staging.tensors
        update.staging, update.former = None, {}
        update.swap = None
        update.streams.clear()
        if self._current is update:
            self._current = None
            metrics.STAGED_BYTES.set(sum(tensor.nbytes for tensor in self._spare.values()))
        metrics.UPDATES.labels(state.value).inc()

    def _make_way(self, opening: Opening) -> None:
        former = self._current
        if former is None:
            return
        if former.streams or former.swap is not None:
            raise aborted("UPDATE_IN_PROGRESS", f"update {former.opening.update_id!r} is being staged")
        self.end(former, UpdateState.FAILED)
