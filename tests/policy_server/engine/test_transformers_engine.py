"""What is particular to the engine over transformers' continuous batching; the other tests here run it too."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from transformers import ContinuousBatchingConfig

from policy_server.engine import paged
from policy_server.engine.observer import Phase
from policy_server.engine.protocol import InFlight, VersionSpan
from policy_server.engine.transformers_engine import TransformersEngine
from tests.policy_server.engine import harness
from tests.policy_server.engine.architectures import CONFIGS, loaded, make_model
from tests.policy_server.engine.harness import (
    FIRST,
    INITIAL,
    NOT_PAGED,
    Gathered,
    Watcher,
    generate,
    request,
    running,
    until,
)
from tests.policy_server.engine.test_generation import generated_by_transformers

PROMPTS = [list(range(start, start + 12)) for start in range(0, 60, 10)]


@pytest.fixture(autouse=True)
def this_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "tested", "transformers")


@pytest.mark.parametrize("architecture", sorted(CONFIGS))
def test_what_continuous_batching_would_run_wrongly_is_refused_at_the_start(architecture: str) -> None:
    model = make_model(architecture)
    attention = model.config._attn_implementation
    if model.config.model_type not in NOT_PAGED:
        TransformersEngine(loaded(model))
        return
    with pytest.raises(ValueError, match="can't run in transformers' continuous batching"):
        TransformersEngine(loaded(model))
    assert model.config._attn_implementation == attention


def test_a_reference_that_could_not_generate_is_refused_at_the_start() -> None:
    with pytest.raises(ValueError, match="Bloom"):
        TransformersEngine(loaded(make_model("gpt2"), make_model("bloom")))


def test_memory_for_less_than_one_context_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged, "MEMORY_SHARE", 1e-9)
    with pytest.raises(ValueError, match="memory"):
        TransformersEngine(loaded(make_model("gpt2")))


async def test_a_seed_gives_what_it_gives_with_our_own_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = request([3, 1, 4], n=4, seed=2**64 - 2, max_new_tokens=30, temperature=0.8, top_k=50, top_p=0.9)
    answers = []
    for engine_name in ("own", "transformers"):
        monkeypatch.setattr(harness, "tested", engine_name)
        async with running(loaded(make_model("llama"))) as engine:
            answers.append(await generate(engine, asked))
    own, theirs = answers
    assert [each.token_ids for each in theirs] == [each.token_ids for each in own]
    for one, other in zip(theirs, own, strict=True):
        assert one.raw_logprobs == pytest.approx(other.raw_logprobs, abs=1e-4)
        assert one.processed_logprobs == pytest.approx(other.processed_logprobs, abs=1e-4)


async def test_a_prompt_longer_than_a_forward_is_read_in_parts_beside_what_decodes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(paged, "FORWARD_TOKENS", 8)
    model = make_model("qwen2")
    watcher = Watcher()
    async with running(loaded(model), max_batch_rows=4, observer=watcher) as engine:
        answers = await asyncio.gather(*(_greedy(engine, prompt) for prompt in (*PROMPTS, list(range(90)))))
    for prompt, completion in zip((*PROMPTS, list(range(90))), answers, strict=True):
        assert completion.token_ids == generated_by_transformers(model, prompt, 20)
    assert watcher.by_phase[Phase.PREFILL] == sum(map(len, PROMPTS)) + 90


async def test_a_cache_that_is_full_makes_rows_wait_and_changes_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    def small(**settings: Any) -> ContinuousBatchingConfig:
        return ContinuousBatchingConfig(**{**settings, "num_blocks": 32})

    monkeypatch.setattr(paged, "PAGE_TOKENS", 4)
    monkeypatch.setattr(paged, "ContinuousBatchingConfig", small)
    model = make_model("gpt2")
    watcher = Watcher()
    async with running(loaded(model), max_batch_rows=len(PROMPTS), observer=watcher) as engine:
        answers = await asyncio.gather(*(_greedy(engine, prompt) for prompt in PROMPTS))
    for prompt, completion in zip(PROMPTS, answers, strict=True):
        assert completion.token_ids == generated_by_transformers(model, prompt, 20)
    assert watcher.by_phase[Phase.PREFILL] > sum(map(len, PROMPTS)), "no row had to give way"


async def test_no_page_outlives_its_sequence_or_its_weights() -> None:
    watcher = Watcher()
    async with running(loaded(make_model("gpt2")), observer=watcher) as engine:
        assert isinstance(engine, TransformersEngine)
        watcher.pause_after(1)
        left = engine.submit(request([1, 2], n=3, max_new_tokens=100, min_new_tokens=100))
        await until(lambda: watcher.held)
        kept = asyncio.create_task(_greedy(engine, [5, 6, 7]))
        await asyncio.sleep(0)
        watcher.pause_after(3)
        await until(lambda: watcher.held)
        assert len(_pages(engine)) == 4
        await left.aclose()
        swap = asyncio.create_task(
            engine.load_weights({}, FIRST, if_current=None, in_flight=InFlight.RECOMPUTE),
        )
        await asyncio.sleep(0)
        before = set(_pages(engine))
        watcher.pause_after(2)
        await until(lambda: watcher.held)
        assert len(_pages(engine)) == 1
        assert not before & set(_pages(engine))
        watcher.resume()
        completion = await kept
        await swap
        await until(lambda: watcher.rows == 0)
        assert not _pages(engine)
    assert [span.oldest_cache for span in completion.spans] == [None] * len(completion.spans)
    assert {span.weights for span in completion.spans} == {INITIAL, FIRST}


async def test_keep_cache_tells_the_age_of_a_prompt_that_was_half_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged, "FORWARD_TOKENS", 8)
    watcher = Watcher()
    async with running(loaded(make_model("gpt2")), max_batch_rows=2, observer=watcher) as engine:
        decoding = asyncio.create_task(_greedy(engine, [1, 2]))
        watcher.pause_after(1)
        reading = asyncio.create_task(_greedy(engine, list(range(60))))
        await until(lambda: watcher.held)
        assert 2 < watcher.by_phase[Phase.PREFILL] < 62
        swap = asyncio.create_task(engine.load_weights({}, FIRST, if_current=None, in_flight=InFlight.KEEP_CACHE))
        await asyncio.sleep(0)
        watcher.resume()
        completion, _, _ = await asyncio.gather(reading, decoding, swap)
    assert set(completion.spans) == {VersionSpan(FIRST, 1, INITIAL)}


async def _greedy(engine: Any, prompt: list[int]) -> Gathered:
    [completion] = await generate(engine, request(prompt, temperature=0.0, max_new_tokens=20))
    return completion


def _pages(engine: TransformersEngine) -> dict[str, list[int]]:
    """The pages that each sequence of the policy holds."""
    [batch] = engine._paged._batches.values()
    [allocator] = batch._processor.cache.cache_allocators.values()
    return dict(allocator.block_table)
