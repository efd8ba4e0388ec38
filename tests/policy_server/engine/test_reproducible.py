from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from policy_server.engine.batch import BatchEngine
from policy_server.engine.loading import load_models
from policy_server.engine.protocol import InFlight, Scores, ScoringRequest
from tests.policy_server.engine.harness import FIRST, Gathered, Watcher, generate, request, running, until
from tests.support.models import make_tiny_gpt2

SEQUENCES = [([i], list(range(1, 3 + 5 * i))) for i in range(1, 6)]
ASKED = request(range(20), n=5, seed=3, max_new_tokens=40, min_new_tokens=40, temperature=0.9)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield make_tiny_gpt2(tmp_path / "model", width=64)
    torch.use_deterministic_algorithms(False)


async def answers(engine: BatchEngine) -> tuple[list[Gathered], Scores]:
    completions, scores = await asyncio.gather(
        generate(engine, ASKED), engine.log_probs(ScoringRequest("s", "policy", SEQUENCES, entropies=True))
    )
    return completions, scores


async def test_tokens_and_logprobs_are_bit_for_bit_the_same_whatever_ran_before_or_beside(folder: Path) -> None:
    settings = {"reproducible": True, "max_batch_rows": 8}
    async with running(load_models(folder, None, torch.float32, "cpu", True), **settings) as engine:
        alone = await answers(engine)
    litter = [torch.empty(size) for size in random.Random(0).sample(range(1, 5000), 50)]
    models = load_models(folder, None, torch.float32, "cpu", True)
    async with running(models, **settings) as engine:
        others = [
            asyncio.create_task(generate(engine, request(range(length), n=3, seed=length, max_new_tokens=60)))
            for length in (1, 7, 33, 20)
        ]
        await generate(engine, request([5], max_new_tokens=9))
        beside = await answers(engine)
        await asyncio.gather(*others)
        after = await answers(engine)
    assert alone == beside == after
    del litter


async def test_weights_that_were_published_give_what_weights_that_were_loaded_give(tmp_path: Path) -> None:
    first, second = make_tiny_gpt2(tmp_path / "a", width=64), make_tiny_gpt2(tmp_path / "b", width=64, seed=1)
    target = load_models(second, None, torch.float32, "cpu", True)
    try:
        async with running(target, reproducible=True) as engine:
            completions, scores = await answers(engine)
        async with running(load_models(first, None, torch.float32, "cpu", True), reproducible=True) as engine:
            await generate(engine, ASKED)
            tensors = dict(target.policy.named_parameters())
            await engine.load_weights(tensors, FIRST, if_current=None, in_flight=InFlight.RECOMPUTE)
            published, published_scores = await answers(engine)
    finally:
        torch.use_deterministic_algorithms(False)
    assert [each.token_ids for each in published] == [each.token_ids for each in completions]
    assert [each.raw_logprobs for each in published] == [each.raw_logprobs for each in completions]
    assert (published_scores.logprobs, published_scores.entropies) == (scores.logprobs, scores.entropies)


async def test_requests_never_share_a_batch(folder: Path) -> None:
    watcher = Watcher()
    models = load_models(folder, None, torch.float32, "cpu", True)
    async with running(models, reproducible=True, max_batch_rows=8, observer=watcher) as engine:
        watcher.pause_after(1)
        tasks = [asyncio.create_task(generate(engine, ASKED))]
        await until(lambda: watcher.held)
        tasks += [asyncio.create_task(generate(engine, request([i], n=3, max_new_tokens=9))) for i in range(4)]
        await asyncio.sleep(0)
        watcher.resume()
        await asyncio.gather(*tasks)
    assert set(watcher.decoded_batches) <= {1, 2, 3, 5}
    assert watcher.most_rows == 8
