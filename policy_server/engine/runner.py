"""How rows get their tokens: what the engine's thread asks of whoever runs the models, and our own way."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from policy_server.engine import cache as caches
from policy_server.engine.decoding import Cohort, Prefill
from policy_server.engine.generation import Row
from policy_server.engine.model import ServedModel


class RowOwner(Protocol):
    """What a runner does with what it computes."""

    def sample(self, rows: Sequence[Row], logits: Tensor) -> list[int]:
        """Give every row the token that its settings draw from its line of logits [rows, vocab]; returns the tokens.

        A row may have ended afterwards, and one that had ended before keeps its last state.
        """
        ...

    def prefilled(self, tokens: int) -> None:
        """So many tokens of prompts and completions are in a cache now."""
        ...

    def decoded(self, rows: int, *, seconds: float) -> None:
        """So many rows got one more token out of their caches."""
        ...

    def fail_rows(self, rows: Sequence[Row], error: Exception) -> None:
        """End the requests of these rows; the runner has forgotten them."""
        ...


class Runner(Protocol):
    """Runs rows of every model. The engine's thread alone calls it; between calls rows end and weights change.

    A forward that fails is told to the owner, who ends its rows: `start` and `step` don't raise.
    """

    @property
    def rows(self) -> list[Row]:
        """All rows that run, of all models."""
        ...

    @property
    def cache_bytes(self) -> int:
        """Memory that the caches of these rows hold."""
        ...

    def start(self, rows: Sequence[Row], owner: RowOwner) -> None:
        """Run rows of one model, from their prompts and the tokens that they have."""
        ...

    def step(self, owner: RowOwner) -> None:
        """The next forward of all that run."""
        ...

    def drop_dead_rows(self) -> None:
        """Free what is held for rows that want no more tokens."""
        ...

    def forget(self, model: ServedModel) -> list[Row]:
        """Free what is held for all rows of a model, and return them."""
        ...

    def clear(self) -> None:
        """Free what is held for any row."""
        ...


class CohortRunner:
    """Rows of a model in one rectangular batch. A step reads some of the prompts that wait, and decodes what runs.

    prefill_tokens: of prompts, padding included, that a step reads at most, so that decoding does not wait for a long
    one. reproducible: what was not started together never shares a batch.
    """

    def __init__(self, *, prefill_tokens: int, reproducible: bool) -> None:
        self._prefill_tokens = prefill_tokens
        self._reproducible = reproducible
        self._prefills: list[Prefill] = []
        self._cohorts: list[Cohort] = []

    @property
    def rows(self) -> list[Row]:
        """All rows that run."""
        return [row for batch in self._batches() for row in batch.rows]

    @property
    def cache_bytes(self) -> int:
        """Memory of all caches."""
        return sum(caches.held_bytes(batch.cache) for batch in self._batches())

    def start(self, rows: Sequence[Row], owner: RowOwner) -> None:
        """Let the next steps read the rows' prompts, more urgent ones first, and decode from then on with what runs."""
        try:
            self._prefills.append(Prefill(rows[0].model, rows))
        except Exception as error:
            owner.fail_rows(rows, error)

    def step(self, owner: RowOwner) -> None:
        """Some more of the prompts, and one token for every row whose prompt is read."""
        if self._prefills:
            self._advance(min(self._prefills, key=lambda each: each.urgency), owner)
        for cohort in list(self._cohorts):
            started = time.perf_counter()
            rows = list(cohort.rows)
            try:
                owner.sample(rows, cohort.step())
                cohort.drop_dead_rows()
            except Exception as error:
                cohort.rows.clear()
                owner.fail_rows(rows, error)
                continue
            owner.decoded(len(rows), seconds=time.perf_counter() - started)

    def drop_dead_rows(self) -> None:
        """Free the rows that want no more tokens."""
        for batch in self._batches():
            batch.drop_dead_rows()
        self._prefills = [prefill for prefill in self._prefills if prefill.rows]
        self._cohorts = [cohort for cohort in self._cohorts if cohort.rows]

    def forget(self, model: ServedModel) -> list[Row]:
        """Drop a model's caches, and return the rows that had them."""
        rows = [row for row in self.rows if row.model is model]
        self._prefills = [prefill for prefill in self._prefills if prefill.model is not model]
        self._cohorts = [cohort for cohort in self._cohorts if cohort.model is not model]
        return rows

    def clear(self) -> None:
        """Drop all caches."""
        self._prefills.clear()
        self._cohorts.clear()

    def _batches(self) -> list[Prefill | Cohort]:
        return [*self._prefills, *self._cohorts]

    def _advance(self, prefill: Prefill, owner: RowOwner) -> None:
        try:
            logits = prefill.advance(self._prefill_tokens)
            if logits is None:
                return
            cohort = prefill.cohort()
            owner.sample(cohort.rows, logits)
        except Exception as error:
            self._prefills.remove(prefill)
            owner.fail_rows(prefill.rows, error)
            return
        self._prefills.remove(prefill)
        owner.prefilled(prefill.tokens)
        cohort.drop_dead_rows()
        if not cohort.rows:
            return
        host = None if self._reproducible else next((c for c in self._cohorts if c.can_absorb(cohort)), None)
        if host is None:
            self._cohorts.append(cohort)
            return
        try:
            host.absorb(cohort)
        except Exception as error:
            lost, host.rows = [*host.rows, *cohort.rows], []
            owner.fail_rows(lost, error)
