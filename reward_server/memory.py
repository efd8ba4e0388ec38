"""What the server remembers of the samples it has seen, so that a repeated call gets the first answer."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from reward_server.results import Outcome, Pending


class SampleKey(NamedTuple):
    """A sample's name: ids are unique within a run only."""

    run_id: str
    sample_id: str


class OutcomeMemory:
    """Final outcomes by sample, the least recently asked for forgotten first. PENDING is never remembered."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._entries: OrderedDict[SampleKey, tuple[bytes, Outcome]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def recall(self, key: SampleKey) -> tuple[bytes, Outcome] | None:
        """The fingerprint of the content first seen under `key` and its outcome, or None."""
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(key)
        return entry

    def forget(self, key: SampleKey) -> None:
        """Judge it anew when it comes again; does nothing for what is not remembered."""
        self._entries.pop(key, None)

    def remember(self, key: SampleKey, fingerprint: bytes, outcome: Outcome) -> None:
        """Keep a final outcome; forgets the oldest beyond the capacity."""
        if isinstance(outcome, Pending):
            return
        self._entries[key] = (fingerprint, outcome)
        self._entries.move_to_end(key)
        while len(self._entries) > self._capacity:
            self._entries.popitem(last=False)
