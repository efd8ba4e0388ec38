"""Run an engine and gather what it yields."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from policy_server.engine.batch import BatchEngine
from policy_server.engine.loading import LoadedModels
from policy_server.engine.observer import Phase, SilentObserver
from policy_server.engine.protocol import (
    FinishReason,
    GenerationRequest,
    Sampling,
    TokenDelta,
    VersionSpan,
    WeightsVersion,
)
from policy_server.engine.transformers_engine import TransformersEngine

INITIAL = WeightsVersion()
FIRST, SECOND = WeightsVersion("run", 1, 1), WeightsVersion("run", 1, 2)

ENGINES: dict[str, type[BatchEngine]] = {"own": BatchEngine, "transformers": TransformersEngine}
NOT_PAGED = frozenset({"bloom", "falcon", "gemma2", "lfm2", "mpt"})
"""Architectures that continuous batching does not run on a CPU; test_transformers_engine.py proves it."""

tested = "own"
"""The engine that `running` runs; the fixture each_engine sets it."""


@dataclass
class Gathered:
    """A completion put together from its deltas."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    raw_logprobs: list[float] = field(default_factory=list)
    processed_logprobs: list[float] = field(default_factory=list)
    spans: list[VersionSpan] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_string: str = ""
    deltas: int = 0

    def add(self, delta: TokenDelta) -> None:
        assert self.finish_reason is None, "a delta after the last"
        self.token_ids += delta.token_ids
        self.text += delta.text
        self.raw_logprobs += delta.raw_logprobs
        self.processed_logprobs += delta.processed_logprobs
        self.spans += delta.spans
        self.finish_reason = delta.finish_reason
        self.stop_string = delta.stop_string
        self.deltas += 1
        assert sum(span.token_count for span in delta.spans) == len(delta.token_ids)


@dataclass(frozen=True)
class _Hold:
    """Where the engine's thread stands still, until the gate opens."""

    phase: Phase
    at: int
    gate: threading.Event = field(default_factory=threading.Event)


class Watcher(SilentObserver):
    """Remembers what the engine told, and can hold the engine's thread between two decode steps or micro-batches."""

    def __init__(self) -> None:
        self.rows = 0
        self.most_rows = self.most_cache_bytes = 0
        self.decoded_batches: list[int] = []
        self.cancelled_completions = 0
        self.waiting = 0
        self.finish_reasons: list[FinishReason] = []
        self.by_phase: dict[Phase, int] = dict.fromkeys(Phase, 0)
        self.turns: list[Phase] = []
        """Decode steps and scored micro-batches, as they came."""
        self._hold: _Hold | None = None

    def pause_after(self, turns: int, phase: Phase = Phase.DECODE) -> None:
        """Hold the thread when it has taken so many more turns of `phase`; where it is held now, it goes on."""
        before, self._hold = self._hold, _Hold(phase, self.turns.count(phase) + turns)
        if before is not None:
            before.gate.set()

    def resume(self) -> None:
        before, self._hold = self._hold, None
        if before is not None:
            before.gate.set()

    def queued(self, *, generations: int, scorings: int) -> None:
        self.waiting = generations + scorings

    def running(self, *, rows: int, cache_bytes: int) -> None:
        self.rows = rows
        self.most_rows = max(self.most_rows, rows)
        self.most_cache_bytes = max(self.most_cache_bytes, cache_bytes)

    def tokens(self, phase: Phase, count: int) -> None:
        self.by_phase[phase] += count
        if phase is Phase.SCORE:
            self._took_a_turn(phase)

    def decode_step(self, *, seconds: float, rows: int) -> None:
        self.decoded_batches.append(rows)
        self._took_a_turn(Phase.DECODE)

    def finished(self, reason: FinishReason) -> None:
        self.finish_reasons.append(reason)

    def cancelled(self, *, completions: int) -> None:
        self.cancelled_completions += completions

    @property
    def held(self) -> bool:
        hold = self._hold
        return hold is not None and self.turns.count(hold.phase) >= hold.at

    def _took_a_turn(self, phase: Phase) -> None:
        self.turns.append(phase)
        hold = self._hold
        if hold is not None and hold.phase is phase and self.turns.count(phase) >= hold.at:
            assert hold.gate.wait(30)


@asynccontextmanager
async def running(models: LoadedModels, **settings: Any) -> AsyncIterator[BatchEngine]:
    if tested == "transformers":
        if models.policy.config.model_type in NOT_PAGED:
            pytest.skip("refused by this engine")
        if settings.pop("reproducible", False):
            pytest.skip("not offered by this engine")
    engine = ENGINES[tested](models, **settings)
    await engine.start()
    try:
        yield engine
    finally:
        if isinstance(observer := settings.get("observer"), Watcher):
            observer.resume()
        await engine.stop(finish_within=0.0)


def request(prompt: Sequence[int], *, name: str = "request", **fields: Any) -> GenerationRequest:
    """A request; sampling settings and request fields in one bag, log-probabilities of both kinds by default."""
    sampling_names = set(Sampling.__dataclass_fields__)
    sampling = Sampling(**{key: value for key, value in fields.items() if key in sampling_names})
    others = {key: value for key, value in fields.items() if key not in sampling_names}
    return GenerationRequest(
        request_id=name,
        model=others.pop("model", "policy"),
        prompt_token_ids=tuple(prompt),
        sampling=sampling,
        raw_logprobs=others.pop("raw_logprobs", True),
        processed_logprobs=others.pop("processed_logprobs", True),
        **others,
    )


async def generate(engine: BatchEngine, asked: GenerationRequest) -> list[Gathered]:
    completions = [Gathered() for _ in range(asked.sampling.n)]
    async for delta in engine.submit(asked):
        completions[delta.index].add(delta)
    assert all(completion.finish_reason is not None for completion in completions)
    return completions


async def until(condition: Callable[[], bool], *, seconds: float = 20.0) -> None:
    """Wait for what another thread brings about."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 -- what is awaited happens on another thread
            await asyncio.sleep(0.002)
