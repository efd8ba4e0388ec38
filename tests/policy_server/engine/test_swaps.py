from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import grpc
import pytest
import torch
from transformers import PreTrainedModel

from policy_server.engine.batch import BatchEngine
from policy_server.engine.observer import Phase
from policy_server.engine.protocol import (
    FinishReason,
    GenerationRequest,
    InFlight,
    ScoringRequest,
    TokenStream,
    VersionSpan,
    WeightsPrecondition,
    WeightsVersion,
)
from rlhf.failures import RpcFailure
from tests.policy_server.engine.architectures import loaded, make_model
from tests.policy_server.engine.harness import (
    FIRST,
    INITIAL,
    SECOND,
    Gathered,
    Watcher,
    generate,
    request,
    running,
    until,
)

pytestmark = pytest.mark.usefixtures("each_engine")

LENGTH = 16


def weights_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def greedy(prompt: list[int], **fields: object) -> GenerationRequest:
    return request(prompt, temperature=0.0, max_new_tokens=LENGTH, min_new_tokens=LENGTH, **fields)


async def gather(stream: TokenStream, count: int = 1) -> list[Gathered]:
    completions = [Gathered() for _ in range(count)]
    async for delta in stream:
        completions[delta.index].add(delta)
    return completions


class Halfway:
    """An engine whose thread stands between two decode steps of a running completion."""

    def __init__(self, engine: BatchEngine, watcher: Watcher, stream: TokenStream) -> None:
        self.engine, self.watcher, self.stream = engine, watcher, stream

    async def swap(self, model: PreTrainedModel, in_flight: InFlight) -> asyncio.Task[WeightsVersion]:
        task = asyncio.create_task(
            self.engine.load_weights(weights_of(model), FIRST, if_current=None, in_flight=in_flight)
        )
        await asyncio.sleep(0)
        self.watcher.resume()
        return task


async def halfway(asked: GenerationRequest, architecture: str = "gpt2") -> AsyncIterator[Halfway]:
    watcher = Watcher()
    async with running(loaded(make_model(architecture)), observer=watcher) as engine:
        watcher.pause_after(5)
        stream = engine.submit(asked)
        await until(lambda: watcher.held)
        yield Halfway(engine, watcher, stream)


def continued(old: PreTrainedModel, new: PreTrainedModel, prompt: list[int], switch: int) -> list[int]:
    """Greedy tokens, the first `switch` by one model and the others by another that reads everything again."""
    tokens: list[int] = []
    while len(tokens) < LENGTH:
        model = old if len(tokens) < switch else new
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, -1]
        logits[model.config.eos_token_id] = -torch.inf
        tokens.append(int(logits.argmax()))
    return tokens


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "qwen2"])
async def test_recompute_goes_on_as_if_the_new_weights_had_read_everything(architecture: str) -> None:
    old, new = make_model(architecture), make_model(architecture, seed=1)
    async for engine in halfway(greedy([4, 5, 6]), architecture):
        swap = await engine.swap(new, InFlight.RECOMPUTE)
        [completion] = await gather(engine.stream)
        assert await swap == FIRST
    first, second = _join(completion.spans)
    assert (first.weights, second.weights) == (INITIAL, FIRST)
    assert (first.oldest_cache, second.oldest_cache) == (None, None)
    assert completion.token_ids == continued(old, new, [4, 5, 6], first.token_count)


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "lfm2"])
async def test_recompute_serves_rows_of_different_lengths(architecture: str) -> None:
    old, new = make_model(architecture), make_model(architecture, seed=1)
    prompts = [[4, 5, 6], list(range(20)), [9]]
    watcher = Watcher()
    async with running(loaded(make_model(architecture)), observer=watcher) as engine:
        watcher.pause_after(6)
        streams = [engine.submit(greedy(prompt)) for prompt in prompts]
        await until(lambda: watcher.held)
        swap = asyncio.create_task(
            engine.load_weights(weights_of(new), FIRST, if_current=None, in_flight=InFlight.RECOMPUTE)
        )
        await asyncio.sleep(0)
        watcher.resume()
        completions = [completion for stream in streams for completion in await gather(stream)]
        await swap
    for prompt, completion in zip(prompts, completions, strict=True):
        first, _ = _join(completion.spans)
        assert completion.token_ids == continued(old, new, prompt, first.token_count)


async def test_keep_cache_goes_on_with_old_entries_and_the_spans_say_so() -> None:
    async for engine in halfway(greedy([4, 5, 6])):
        swap = await engine.swap(make_model("gpt2", seed=1), InFlight.KEEP_CACHE)
        [completion] = await gather(engine.stream)
        await swap
    first, second = _join(completion.spans)
    assert (first.weights, first.oldest_cache) == (INITIAL, None)
    assert (second.weights, second.oldest_cache) == (FIRST, INITIAL)
    assert first.token_count + second.token_count == LENGTH


async def test_wait_finishes_what_runs_while_new_requests_queue() -> None:
    new = make_model("gpt2", seed=1)
    async for engine in halfway(greedy([4, 5, 6])):
        swap = await engine.swap(new, InFlight.WAIT)
        later = asyncio.create_task(generate(engine.engine, greedy([7])))
        [completion] = await gather(engine.stream)
        await swap
        [after] = await later
    assert _join(completion.spans) == [VersionSpan(INITIAL, LENGTH)]
    assert _join(after.spans) == [VersionSpan(FIRST, LENGTH)]
    assert after.token_ids == continued(new, new, [7], 0)


async def test_a_cancelled_wait_swaps_nothing() -> None:
    async for engine in halfway(greedy([4, 5, 6])):
        swap = asyncio.create_task(engine.engine.load_weights({}, FIRST, if_current=None, in_flight=InFlight.WAIT))
        await asyncio.sleep(0)
        swap.cancel()
        await asyncio.gather(swap, return_exceptions=True)
        engine.watcher.resume()
        await gather(engine.stream)
        await generate(engine.engine, greedy([1]))
        assert engine.engine.describe("policy").weights == INITIAL


async def test_abort_ends_completions_with_the_tokens_they_have() -> None:
    async for engine in halfway(greedy([4, 5, 6], stream_interval=100)):
        swap = await engine.swap(make_model("gpt2", seed=1), InFlight.ABORT)
        [completion] = await gather(engine.stream)
        await swap
        prefix = tuple(completion.token_ids)
        [rest] = await generate(engine.engine, greedy([4, 5, 6], completion_prefix=prefix))
    assert completion.finish_reason is FinishReason.ABORTED
    assert 0 < len(completion.token_ids) < LENGTH
    assert _join(completion.spans) == [VersionSpan(INITIAL, len(completion.token_ids))]
    assert _join(rest.spans) == [VersionSpan(FIRST, LENGTH - len(prefix))]


async def test_an_exact_version_that_is_swapped_away_ends_the_completions_that_have_tokens() -> None:
    exact = WeightsPrecondition(exact=INITIAL)
    watcher = Watcher()
    async with running(loaded(make_model("gpt2")), max_batch_rows=2, observer=watcher) as engine:
        watcher.pause_after(5)
        stream = engine.submit(greedy([4], n=3, weights=exact))
        waiting = engine.submit(greedy([5], weights=exact))
        await until(lambda: watcher.held)
        swap = asyncio.create_task(engine.load_weights({}, FIRST, if_current=None, in_flight=InFlight.RECOMPUTE))
        await asyncio.sleep(0)
        watcher.resume()
        completions = await gather(stream, 3)
        with pytest.raises(RpcFailure) as caught:
            await gather(waiting)
        await swap
    assert [each.finish_reason for each in completions] == [FinishReason.ABORTED] * 3
    assert [bool(each.token_ids) for each in completions] == [True, True, False]
    assert all(span.weights == INITIAL for each in completions for span in each.spans)
    assert caught.value.reason == "OTHER_RUN"


async def test_a_minimum_version_stays_met_when_newer_weights_arrive() -> None:
    async with running(loaded(make_model("gpt2"))) as engine:
        await engine.load_weights({}, FIRST, if_current=None, in_flight=InFlight.RECOMPUTE)
        at_least = WeightsPrecondition(minimum=FIRST)
        [completion] = await generate(engine, greedy([1], weights=at_least))
        await engine.load_weights({}, SECOND, if_current=FIRST, in_flight=InFlight.RECOMPUTE)
        [later] = await generate(engine, greedy([1], weights=at_least))
        with pytest.raises(RpcFailure) as caught:
            await generate(engine, greedy([1], weights=WeightsPrecondition(exact=FIRST)))
    assert (completion.spans[0].weights, later.spans[0].weights) == (FIRST, SECOND)
    assert caught.value.reason == "WEIGHTS_AHEAD"


async def test_scores_are_all_of_one_version_even_when_a_swap_comes_between() -> None:
    new = make_model("gpt2", seed=1)
    source = random.Random(0)
    sequences = [([source.randrange(256)], [source.randrange(256) for _ in range(8)]) for _ in range(80)]
    watcher = Watcher()
    async with running(loaded(make_model("gpt2")), score_tokens=16, observer=watcher) as engine:
        watcher.pause_after(1, Phase.SCORE)
        scoring = asyncio.create_task(engine.log_probs(ScoringRequest("r", "policy", sequences)))
        frozen = asyncio.create_task(engine.log_probs(ScoringRequest("f", "reference", sequences)))
        await until(lambda: watcher.held)
        swap = asyncio.create_task(
            engine.load_weights(weights_of(new), FIRST, if_current=None, in_flight=InFlight.RECOMPUTE)
        )
        await asyncio.sleep(0)
        watcher.resume()
        await swap
        scores, of_reference = await scoring, await frozen
        again = await engine.log_probs(ScoringRequest("r", "policy", sequences))
        reference_again = await engine.log_probs(ScoringRequest("f", "reference", sequences))
    assert scores.weights == FIRST
    assert scores.logprobs == again.logprobs
    assert of_reference == reference_again
    assert of_reference.weights == INITIAL


@pytest.mark.parametrize(
    ("live", "version", "if_current", "code"),
    [
        (FIRST, FIRST, None, grpc.StatusCode.ABORTED),
        (SECOND, FIRST, SECOND, grpc.StatusCode.ABORTED),
        (FIRST, WeightsVersion("run", 0, 9), None, grpc.StatusCode.ABORTED),
        (FIRST, SECOND, INITIAL, grpc.StatusCode.FAILED_PRECONDITION),
        (INITIAL, FIRST, SECOND, grpc.StatusCode.FAILED_PRECONDITION),
        (FIRST, WeightsVersion("other", 1, 1), None, grpc.StatusCode.FAILED_PRECONDITION),
        (FIRST, WeightsVersion("other", 1, 1), SECOND, grpc.StatusCode.FAILED_PRECONDITION),
        (FIRST, WeightsVersion("other", 1, 1), FIRST, None),
        (FIRST, WeightsVersion("run", 2, 1), None, None),
        (FIRST, SECOND, FIRST, None),
        (INITIAL, FIRST, INITIAL, None),
    ],
)
async def test_only_newer_weights_of_the_run_or_a_named_predecessor_go_live(
    live: WeightsVersion, version: WeightsVersion, if_current: WeightsVersion | None, code: grpc.StatusCode | None
) -> None:
    model = make_model("gpt2")
    zeros = {name: torch.zeros_like(tensor) for name, tensor in weights_of(model).items()}
    async with running(loaded(model)) as engine:
        if live != INITIAL:
            await engine.load_weights({}, live, if_current=None, in_flight=InFlight.RECOMPUTE)
        if code is None:
            assert await engine.load_weights(zeros, version, if_current=if_current, in_flight=InFlight.WAIT) == version
            return
        with pytest.raises(RpcFailure) as caught:
            await engine.load_weights(zeros, version, if_current=if_current, in_flight=InFlight.RECOMPUTE)
        assert caught.value.code is code
        assert engine.describe("policy").weights == live
    assert all(bool(tensor.any()) for tensor in weights_of(model).values() if tensor.ndim > 1)


async def test_a_copy_that_fails_reaches_the_writer_and_the_engine_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(loaded(make_model("gpt2"))) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(engine._parameters, "load", lambda _: 1 / 0)
            with pytest.raises(RpcFailure) as caught:
                await engine.load_weights({}, FIRST, if_current=None, in_flight=InFlight.RECOMPUTE)
        assert engine.describe("policy").weights == INITIAL
        await generate(engine, greedy([1]))
    assert caught.value.code is grpc.StatusCode.INTERNAL


def _join(spans: list[VersionSpan]) -> list[VersionSpan]:
    """Spans of all deltas with equal neighbours joined."""
    joined: list[VersionSpan] = []
    for span in spans:
        if joined and (joined[-1].weights, joined[-1].oldest_cache) == (span.weights, span.oldest_cache):
            joined[-1] = VersionSpan(span.weights, joined[-1].token_count + span.token_count, span.oldest_cache)
        else:
            joined.append(span)
    return joined
