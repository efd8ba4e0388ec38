"""What became of the samples of the recent past, so that a repeated one gets the same answer."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from rlhf.reward.v1 import reward_pb2


class Remembered(NamedTuple):
    """A sample's result, with the fingerprint of the content that it is for."""

    fingerprint: bytes
    result: reward_pb2.SampleResult


class Memory:
    """At most `capacity` results, the least recently used forgotten first.

    Without a lock: it is used on the event loop alone, and nothing here awaits.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._entries: OrderedDict[tuple[str, str], Remembered] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def recall(self, run_id: str, sample_id: str) -> Remembered | None:
        """What is remembered of a sample; ids are unique within a run only."""
        entry = self._entries.get((run_id, sample_id))
        if entry is not None:
            self._entries.move_to_end((run_id, sample_id))
        return entry

    def remember(self, run_id: str, sample_id: str, entry: Remembered) -> Remembered:
        """Keep a result, and return the one that counts: the first, should another call have been faster."""
        kept = self._entries.setdefault((run_id, sample_id), entry)
        self._entries.move_to_end((run_id, sample_id))
        if len(self._entries) > self._capacity:
            self._entries.popitem(last=False)
        return kept
