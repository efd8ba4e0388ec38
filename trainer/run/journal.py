"""The journal: what the reward server has answered for good, on disk before it is used, so that nobody is asked twice.

A line may have cost a person's minutes or a judge's fee. Entries are found by sample id, which holds a hash of the
tokens: a resumed run that samples the same completion again gets its score from here, another completion does not.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import xxhash

from rlhf.logs import get_logger
from trainer.clients.rewards import Abstained, Failed, Outcome, RewardSample, Scored
from trainer.run.runfolder import JsonLines, as_line, replace_durably

_log = get_logger(__name__)

T = TypeVar("T")

_KINDS: dict[str, type[Outcome]] = {"scored": Scored, "abstained": Abstained, "failed": Failed}


class Journal:
    """The final outcomes of one run's samples under one version of its reward; only one process may hold the file."""

    def __init__(self, file: Path, *, reward_version: str, on_found: Callable[[], None] = lambda: None) -> None:
        """Read `file`, which may be absent, and drop what can't be used; `on_found` is called for each answer reused.

        A torn last line is what a crash leaves. Other lines that are not as they were written, and those of another
        version of the reward, are left out with a warning: to ask again costs an answer, to trust them a wrong score.
        """
        self._file = file
        self._reward_version = reward_version
        self._on_found = on_found
        read = list(_read(file)) if file.exists() else []
        self._entries = {entry.sample_id: entry for entry in read if entry.reward_version == reward_version}
        if others := sum(entry.reward_version != reward_version for entry in read):
            _log.warning("scores of another version of the reward are not used", file=str(file), count=others)
        if self._entries:
            _log.info("answers of the reward server are kept from earlier starts", count=len(self._entries))
        self._lines = self._rewritten(list(self._entries.values()))
        # One thread, so that what is written keeps its order while the event loop goes on.
        self._disk = ThreadPoolExecutor(max_workers=1, thread_name_prefix="journal")
        self._unwritten: list[_Entry] = []
        self._batch: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()

    def find(self, sample: RewardSample) -> Outcome | None:
        """What this very sample got, else None: the same tokens with another column of the data are asked again."""
        entry = self._entries.get(sample.sample_id)
        if entry is None or entry.content != _content(sample):
            return None
        self._on_found()
        return entry.outcome

    async def keep(self, sample: RewardSample, outcome: Outcome) -> None:
        """Return once the outcome is on disk; those of one answer of the server share one fsync.

        Cancelling it does not keep the outcome from being written. Raises StorageError.
        """
        entry = _Entry(sample.sample_id, sample.step or 0, self._reward_version, _content(sample), outcome)
        self._entries[entry.sample_id] = entry
        self._unwritten.append(entry)
        if self._batch is None:
            self._batch = asyncio.create_task(self._write_batch())
        await asyncio.shield(self._batch)

    async def forget(self, *, before: int) -> None:
        """Drop the entries of steps below `before`, which no checkpoint leads back to. Raises StorageError."""
        async with self._turn:
            self._entries = {key: entry for key, entry in self._entries.items() if entry.step >= before}
            rewritten = await self._on_disk(self._rewritten, list(self._entries.values()))
            self._lines.close()
            self._lines = rewritten

    async def aclose(self) -> None:
        """Write what was answered and close the file."""
        if self._batch is not None:
            await asyncio.gather(self._batch, return_exceptions=True)
        async with self._turn:
            self._disk.shutdown()
            self._lines.close()

    async def _write_batch(self) -> None:
        # It begins in the next turn of the event loop, and after the batch before: who comes meanwhile shares it.
        async with self._turn:
            entries, self._unwritten, self._batch = self._unwritten, [], None
            await self._on_disk(self._append, entries)

    def _append(self, entries: list[_Entry]) -> None:
        for entry in entries:
            self._lines.write(entry.to_json())
        self._lines.sync()

    def _rewritten(self, entries: list[_Entry]) -> JsonLines:
        """The file with these entries alone, open for more; after a crash it is the old one or this."""
        content = b"".join(as_line(entry.to_json()) for entry in entries)
        replace_durably(self._file, content)
        return JsonLines(self._file, keep_bytes=len(content))

    async def _on_disk(self, work: Callable[[list[_Entry]], T], entries: list[_Entry]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._disk, work, entries)


@dataclass(frozen=True)
class _Entry:
    """`content` stands for everything that the reward may judge by."""

    sample_id: str
    step: int
    reward_version: str
    content: str
    outcome: Outcome

    def to_json(self) -> dict[str, Any]:
        """One line of the file, with a checksum: a digit that turned into another would be a score nobody gave."""
        kind = next(name for name, kind in _KINDS.items() if isinstance(self.outcome, kind))
        line = {**asdict(self), "outcome": {kind: asdict(self.outcome)}}
        return {**line, "xxh3_64": _checksum(line)}

    @classmethod
    def from_json(cls, line: dict[str, Any]) -> Self:
        """Read what `to_json` made; raises ValueError, KeyError or TypeError for anything else."""
        if line.pop("xxh3_64") != _checksum(line):
            raise ValueError("its checksum is another")
        ((kind, values),) = line["outcome"].items()
        if kind == "scored":
            values["token_rewards"] = tuple(values["token_rewards"])
        return cls(**{**line, "outcome": _KINDS[kind](**values)})


def _read(file: Path) -> Iterator[_Entry]:
    *lines, torn = file.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            yield _Entry.from_json(json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            _log.warning(
                "a line of the journal is not as it was written, so its sample is asked again",
                line=f"{file}:{number}",
                error=str(error),
            )
    if torn:
        _log.info("the journal's last line was cut off while it was written", file=str(file))


def _content(sample: RewardSample) -> str:
    judged = [sample.prompt, sample.completion, sample.finish_reason.value, sample.metadata, sample.messages]
    text = json.dumps([*judged, sorted(sample.json_keys)], sort_keys=True, default=str)
    return xxhash.xxh3_128_hexdigest(text.encode())


def _checksum(line: Mapping[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(line, sort_keys=True).encode())
