"""Which waiting request goes next, how many may wait, and how long the others should stay away."""

from __future__ import annotations

import threading
import time
from bisect import insort
from collections.abc import Callable, Iterator, Sequence

from policy_server.engine.budget import Budget
from policy_server.engine.generation import Generation, Row
from policy_server.engine.model import ServedModel
from rlhf import failures

_SMOOTHING = 0.1
_SHORTEST_RETRY, _LONGEST_RETRY = 0.1, 30.0  # seconds


class QueueLimit:
    """Counts requests that wait for their first forward; used by the event loop and the engine's thread."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._waiting = 0
        self._seconds_per_request = 0.1
        self._last_departure: float | None = None

    def enter(self) -> None:
        """Raise overloaded when the queue is full."""
        with self._lock:
            if self._waiting >= self._limit:
                seconds = min(max(self._seconds_per_request, _SHORTEST_RETRY), _LONGEST_RETRY)
                raise failures.overloaded(f"{self._waiting} requests are waiting already", seconds)
            self._waiting += 1

    def leave(self) -> None:
        """One request less waits; the pace at which they leave is how soon a place is free again."""
        with self._lock:
            self._waiting -= 1
            now = time.monotonic()
            if self._last_departure is not None and self._waiting:
                self._seconds_per_request += _SMOOTHING * (now - self._last_departure - self._seconds_per_request)
            self._last_departure = now if self._waiting else None


class WaitingGenerations:
    """Requests with completions that have no row yet, by priority and then arrival."""

    def __init__(self) -> None:
        self._ordered: list[Generation] = []

    def __iter__(self) -> Iterator[Generation]:
        return iter(list(self._ordered))

    def __len__(self) -> int:
        return len(self._ordered)

    def add(self, generation: Generation) -> None:
        """Put it at its place."""
        insort(self._ordered, generation, key=lambda each: (each.request.priority, each.arrival))

    def drop_done(self) -> None:
        """Forget requests that wait no longer."""
        self._ordered = [each for each in self._ordered if each.waiting]


class RowChooser:
    """Chooses the rows that join next. All rows chosen at once run through one prefill, so they are of one model.

    A row joins when the caches have room for all that it and those beside it may come to hold, so that none has to give
    way to another later. Who goes next waits for that: nobody small passes it.
    """

    def __init__(self, budget: Budget, *, one_request_per_batch: bool) -> None:
        self._budget = budget
        self._one_request_per_batch = one_request_per_batch

    def resuming(self, rows: list[Row], *, running: Sequence[Row]) -> list[Row]:
        """Take rows, out of `rows`, whose cache has to be computed again; they were running, so they go first."""
        reserved = self._reserved(running)
        chosen: list[Row] = []
        for row in rows:
            if not reserved.has_room(row.generation) or not self._goes_with(row, chosen):
                break
            reserved.add(row.generation)
            chosen.append(row)
        del rows[: len(chosen)]
        return chosen

    def waiting(
        self,
        waiting: WaitingGenerations,
        make_row: Callable[[Generation], Row | None],
        *,
        running: Sequence[Row],
        started_only: bool,
    ) -> list[Row]:
        """Make rows for the completions that go next, as many as there is room for; one without a row has ended."""
        reserved = self._reserved(running)
        chosen: list[Row] = []
        for generation in waiting:
            if started_only and not generation.admitted:
                continue
            if self._one_request_per_batch and not reserved.has_room(generation, reserved.most_alone(generation)):
                break  # the composition of its batches must not depend on what else runs
            while generation.waiting and reserved.has_room(generation):
                row = make_row(generation)
                if row is None:
                    break
                if not self._goes_with(row, chosen):
                    return chosen
                reserved.add(generation)
                chosen.append(row)
                generation.admitted += 1
            if generation.waiting:
                break
        return chosen

    def _reserved(self, rows: Sequence[Row]) -> _Reserved:
        reserved = _Reserved(self._budget, by_request=self._one_request_per_batch)
        for row in rows:
            reserved.add(row.generation)
        return reserved

    def _goes_with(self, row: Row, chosen: list[Row]) -> bool:
        if not chosen:
            return True
        first = chosen[0]
        if row.model is not first.model:
            return False
        if self._one_request_per_batch:
            return row.generation is first.generation
        starts = {id(each.generation) if each.fresh else id(each) for each in (*chosen, row)}
        longest = max(each.length for each in (*chosen, row))
        return len(starts) * longest <= self._budget.tokens


class _Reserved:
    """What rows take of the budget. Those that share a batch take as much, each, as the longest of them may."""

    def __init__(self, budget: Budget, *, by_request: bool) -> None:
        self._budget = budget
        self._by_request = by_request
        self._rows = 0
        self._batches: dict[Generation | ServedModel, tuple[ServedModel, int, int]] = {}  # model, rows, longest

    def add(self, generation: Generation) -> None:
        """One row more."""
        self._rows += 1
        self._batches[self._batch(generation)] = self._with(generation, 1)

    def has_room(self, generation: Generation, rows: int = 1) -> bool:
        """Whether so many rows of it may join. One row always may where nothing runs."""
        if self._rows + rows > self._budget.rows:
            return False
        if not self._rows:
            return True
        batches = {**self._batches, self._batch(generation): self._with(generation, rows)}
        wanted = sum(count * model.cache_bytes(longest) for model, count, longest in batches.values())
        return wanted <= self._budget.cache_bytes

    def most_alone(self, generation: Generation) -> int:
        """How many of its waiting rows would run at once if nothing else did."""
        fit = self._budget.cache_bytes / generation.model.cache_bytes(generation.longest)
        return max(int(min(generation.waiting, self._budget.rows, fit)), 1)

    def _batch(self, generation: Generation) -> Generation | ServedModel:
        return generation if self._by_request else generation.model

    def _with(self, generation: Generation, rows: int) -> tuple[ServedModel, int, int]:
        model, count, longest = self._batches.get(self._batch(generation), (generation.model, 0, 0))
        return model, count + rows, max(longest, generation.longest)
