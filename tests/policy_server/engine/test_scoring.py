from __future__ import annotations

import asyncio
import math
import random

import pytest
import torch
from transformers import PreTrainedModel

from policy_server.engine import scoring
from policy_server.engine.observer import Phase
from policy_server.engine.protocol import ScoringRequest, WeightsPrecondition
from policy_server.engine.scoring import plan
from rlhf.failures import RpcFailure
from tests.policy_server.engine.architectures import CONFIGS, VOCAB, loaded, make_model
from tests.policy_server.engine.harness import FIRST, INITIAL, Watcher, generate, request, running, until

pytestmark = pytest.mark.usefixtures("each_engine")

Pairs = list[tuple[list[int], list[int]]]


def pairs(count: int, *, seed: int = 0) -> Pairs:
    source = random.Random(seed)
    sizes = [(source.randint(1, 12), source.randint(1, 20)) for _ in range(count)]
    return [tuple([source.randrange(VOCAB) for _ in range(n)] for n in size) for size in sizes]


def plain(model: PreTrainedModel, sequences: Pairs, temperature: float) -> tuple[list[list[float]], list[list[float]]]:
    """Log-probabilities and entropies by one whole forward per sequence."""
    logprobs, entropies = [], []
    for prompt, completion in sequences:
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].float()
        distribution = torch.distributions.Categorical(logits=logits / temperature)
        logprobs.append(distribution.log_prob(torch.tensor(completion)).tolist())
        entropies.append(distribution.entropy().tolist())
    return logprobs, entropies


def assert_close(actual: list[list[float]], expected: list[list[float]], tolerance: float = 1e-4) -> None:
    assert [len(each) for each in actual] == [len(each) for each in expected]
    for one, other in zip(actual, expected, strict=True):
        assert one == pytest.approx(other, abs=tolerance)


@pytest.mark.parametrize("architecture", sorted(CONFIGS))
async def test_scores_are_those_of_a_plain_forward(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "_MOST_LOGITS", 7 * VOCAB)
    model = make_model(architecture)
    sequences = pairs(9)
    async with running(loaded(model), score_tokens=64) as engine:
        scores = await engine.log_probs(ScoringRequest("r", "policy", sequences, temperature=0.7, entropies=True))
    logprobs, entropies = plain(model, sequences, 0.7)
    assert_close(scores.logprobs, logprobs)
    assert_close(scores.entropies, entropies)
    assert scores.weights == INITIAL


async def test_bfloat16_scores_are_close_to_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("qwen2", dtype=torch.bfloat16)
    sequences = pairs(4)
    async with running(loaded(model)) as engine:
        scores = await engine.log_probs(ScoringRequest("r", "policy", sequences))
    assert_close(scores.logprobs, plain(model, sequences, 1.0)[0], tolerance=0.3)
    assert scores.entropies == [[]] * 4


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma2", "cohere"])
async def test_logits_never_exceed_a_piece(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "_MOST_LOGITS", 5 * VOCAB)
    model = make_model(architecture)
    largest = 0

    def measure(module: torch.nn.Module, arguments: object, output: torch.Tensor) -> None:
        nonlocal largest
        largest = max(largest, output.numel())

    async with running(loaded(model)) as engine:
        handle = model.get_output_embeddings().register_forward_hook(measure)
        await engine.log_probs(ScoringRequest("r", "policy", pairs(6)))
        handle.remove()
    assert 0 < largest <= 5 * VOCAB


async def test_logprobs_of_a_completion_are_the_processed_ones_of_its_sampling() -> None:
    async with running(loaded(make_model("gemma2"))) as engine:
        [completion] = await generate(engine, request([1, 2, 3], temperature=0.6, max_new_tokens=20))
        scores = await engine.log_probs(
            ScoringRequest("r", "policy", [([1, 2, 3], completion.token_ids)], temperature=0.6)
        )
    assert scores.logprobs[0] == pytest.approx(completion.processed_logprobs, abs=1e-4)


async def test_the_reference_scores_with_its_own_weights() -> None:
    policy, reference = make_model("gpt2", seed=0), make_model("gpt2", seed=1)
    sequences = pairs(3)
    async with running(loaded(policy, reference)) as engine:
        scores = await engine.log_probs(ScoringRequest("r", "reference", sequences))
    assert_close(scores.logprobs, plain(reference, sequences, 1.0)[0])


async def test_scores_and_decode_steps_take_turns() -> None:
    watcher = Watcher()
    async with running(loaded(make_model("gpt2")), score_tokens=32, observer=watcher) as engine:
        watcher.pause_after(1)
        stream = engine.submit(request([1, 2], max_new_tokens=120, min_new_tokens=120))
        await until(lambda: watcher.held)
        batches = plan(job := ScoringRequest("r", "policy", pairs(40)), max_tokens=32, one_by_one=False)
        scoring = asyncio.create_task(engine.log_probs(job))
        await asyncio.sleep(0)
        watcher.resume()
        await scoring
        await stream.aclose()
    assert len(batches) < 100
    first = watcher.turns.index(Phase.SCORE)
    taken = watcher.turns[first : first + 2 * len(batches) - 1]
    assert taken == ([Phase.SCORE, Phase.DECODE] * len(batches))[:-1]


def test_a_plan_keeps_the_budget_and_every_sequence() -> None:
    sequences = pairs(50)
    lengths = [len(prompt) + len(completion) for prompt, completion in sequences]
    for one_by_one in (False, True):
        batches = plan(ScoringRequest("r", "policy", sequences), max_tokens=40, one_by_one=one_by_one)
        assert sorted(place for batch in batches for place in batch.sequences) == list(range(50))
        for batch in batches:
            padded = len(batch.sequences) * max(lengths[place] for place in batch.sequences)
            assert padded <= 40 or len(batch.sequences) == 1
            assert len(batch.sequences) == 1 or not one_by_one


@pytest.mark.parametrize("temperature", [1e-45, 1e-20, 3e38])
async def test_any_legal_temperature_gives_finite_scores(temperature: float) -> None:
    async with running(loaded(make_model("gpt2"))) as engine:
        scores = await engine.log_probs(
            ScoringRequest("r", "policy", pairs(3), temperature=temperature, entropies=True)
        )
    assert all(math.isfinite(each) for row in scores.logprobs + scores.entropies for each in row)


async def test_logits_that_are_not_finite_are_a_fault() -> None:
    model = make_model("gpt2")
    with torch.no_grad():
        model.transformer.ln_f.bias[0] = torch.nan
    async with running(loaded(model)) as engine:
        with pytest.raises(RpcFailure, match="not finite"):
            await engine.log_probs(ScoringRequest("r", "policy", pairs(1)))


async def test_an_unmet_precondition_fails_the_scores() -> None:
    async with running(loaded(make_model("gpt2"))) as engine:
        with pytest.raises(RpcFailure) as caught:
            await engine.log_probs(ScoringRequest("r", "policy", pairs(1), weights=WeightsPrecondition(exact=FIRST)))
    assert caught.value.reason == "WEIGHTS_BEHIND"


async def test_a_cancelled_caller_gives_its_place_in_the_queue_back_while_another_is_scored() -> None:
    watcher = Watcher()
    async with running(loaded(make_model("gpt2")), score_tokens=32, max_queue_requests=2, observer=watcher) as engine:
        watcher.pause_after(1, Phase.SCORE)
        long = asyncio.create_task(engine.log_probs(ScoringRequest("r", "policy", pairs(2000))))
        await until(lambda: watcher.held)
        behind = asyncio.create_task(engine.log_probs(ScoringRequest("r", "policy", pairs(1))))
        await asyncio.sleep(0)
        watcher.pause_after(2, Phase.SCORE)
        await until(lambda: watcher.held)
        assert watcher.waiting == 2
        behind.cancel()
        await asyncio.gather(behind, return_exceptions=True)
        watcher.pause_after(2, Phase.SCORE)
        await until(lambda: watcher.held)
        assert watcher.waiting == 1
        assert not long.done()
        watcher.resume()
        long.cancel()
        await asyncio.gather(long, behind, return_exceptions=True)


async def test_a_cancelled_caller_gets_no_further_micro_batches() -> None:
    watcher = Watcher()
    async with running(loaded(make_model("gpt2")), score_tokens=32, max_queue_requests=1, observer=watcher) as engine:
        watcher.pause_after(2, Phase.SCORE)
        task = asyncio.create_task(engine.log_probs(ScoringRequest("r", "policy", pairs(2000))))
        await until(lambda: watcher.held)
        assert watcher.waiting == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        watcher.resume()
        await until(lambda: watcher.waiting == 0)
        await engine.log_probs(ScoringRequest("r", "policy", pairs(1)))
        assert watcher.by_phase[Phase.SCORE] < sum(len(p) + len(c) for p, c in pairs(2000))
