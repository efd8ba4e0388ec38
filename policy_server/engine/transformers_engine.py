"""The second engine: transformers' own continuous batching in the place of our batches."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import partial

from policy_server.engine.batch import POLICY, REFERENCE, BatchEngine
from policy_server.engine.generation import Row
from policy_server.engine.loading import LoadedModels
from policy_server.engine.model import ServedModel
from policy_server.engine.observer import EngineObserver
from policy_server.engine.paged import Forward, PagedBatch
from policy_server.engine.runner import RowOwner, Runner

_TRIED_SEQUENCES = 2  # by which a model shows that it can be run


class TransformersEngine(BatchEngine):
    """A BatchEngine whose rows run in transformers' paged batches; settings as there.

    The policy's cache is made at once and whole, see PagedBatch; the reference gets one when it is first asked to
    generate. Raises ValueError for a model that PagedBatch refuses.
    """

    def __init__(
        self,
        models: LoadedModels,
        *,
        max_batch_rows: int = 64,
        max_queue_requests: int = 1024,
        max_context_tokens: int | None = None,
        score_tokens: int = 8192,
        observer: EngineObserver | None = None,
    ) -> None:
        super().__init__(
            models,
            max_batch_rows=max_batch_rows,
            max_queue_requests=max_queue_requests,
            max_context_tokens=max_context_tokens,
            cache_bytes=math.inf,  # pages come out of a cache that is made at once
            score_tokens=score_tokens,
            pack_weights=False,
            shortcuts=False,
            observer=observer,
        )
        PagedBatch(self._models[REFERENCE], max_sequences=_TRIED_SEQUENCES).close()
        self._paged = PagedRunner(self._models[POLICY], max_rows=max_batch_rows)

    async def stop(self, *, finish_within: float) -> None:
        """As BatchEngine; gives the caches back."""
        await super().stop(finish_within=finish_within)
        self._paged.close()

    @property
    def cache_limit_bytes(self) -> float:
        """Memory of the policy's cache."""
        return self._paged.cache_limit_bytes

    def _max_cached_tokens(self, model: ServedModel) -> int:
        return self._paged.max_cached_tokens

    def _new_runner(self) -> Runner:
        return self._paged


class PagedRunner:
    """A Runner over one PagedBatch for each model."""

    def __init__(self, policy: ServedModel, *, max_rows: int) -> None:
        self._max_rows = max_rows
        self._running: dict[ServedModel, dict[str, Row]] = {policy: {}}
        first = PagedBatch(policy, max_sequences=max_rows)
        self._batches = {policy: first}
        self.cache_limit_bytes = first.cache_limit_bytes
        self.max_cached_tokens = first.max_cached_tokens

    @property
    def rows(self) -> list[Row]:
        """All rows that run."""
        return [row for running in self._running.values() for row in running.values()]

    @property
    def cache_bytes(self) -> int:
        """Memory of the pages in use."""
        return sum(batch.cache_bytes for batch in self._batches.values())

    def start(self, rows: Sequence[Row], owner: RowOwner) -> None:
        """Let rows join the next step of their model."""
        model = rows[0].model
        if model not in self._batches:
            try:
                self._batches[model] = PagedBatch(model, max_sequences=self._max_rows)
            except Exception as error:
                owner.fail_rows(rows, error)
                return
            self._running[model] = {}
        for row in rows:
            self._running[model][self._batches[model].add([*row.prompt, *row.completion])] = row

    def step(self, owner: RowOwner) -> None:
        """One forward for each model with rows: prompts that are new, or a part of one, and a token for every other."""
        for model, running in self._running.items():
            if not running:
                continue
            started = time.perf_counter()
            try:
                work = self._batches[model].step(partial(self._choose, running, owner))
            except Exception as error:
                owner.fail_rows(self.forget(model), error)
                continue
            if work.prefilled:
                owner.prefilled(work.prefilled)
            if work.decoded:
                owner.decoded(work.decoded, seconds=time.perf_counter() - started)

    def drop_dead_rows(self) -> None:
        """Free the pages of rows that want no more tokens."""
        for model, running in self._running.items():
            dead = [name for name, row in running.items() if not row.live]
            for name in dead:
                del running[name]
            self._batches[model].remove(dead)

    def forget(self, model: ServedModel) -> list[Row]:
        """Free a model's pages, and return the rows that had them."""
        if model not in self._running:
            return []
        rows = list(self._running[model].values())
        self._running[model].clear()
        self._batches[model].clear()
        return rows

    def clear(self) -> None:
        """Free all pages."""
        for model in self._running:
            self.forget(model)

    def close(self) -> None:
        """Give the caches back."""
        for batch in self._batches.values():
            batch.close()
        self._batches.clear()
        self._running.clear()

    def _choose(self, running: dict[str, Row], owner: RowOwner, forward: Forward) -> list[int]:
        for name in forward.begun:
            running[name].oldest_cache = running[name].model.version
        rows = [running[name] for name in forward.sampled]
        return owner.sample(rows, forward.logits) if rows else []
