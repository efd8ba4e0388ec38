"""Prompts that are read in pieces between decode steps: the same tokens, and nobody waits for a long one."""

from __future__ import annotations

import asyncio
import random

import pytest
import torch
from transformers import PreTrainedModel

from policy_server.engine.batch import BatchEngine
from policy_server.engine.protocol import FinishReason, InFlight, Priority, TokenStream, VersionSpan
from tests.policy_server.engine.architectures import CONFIGS, EOS, VOCAB, loaded, make_model
from tests.policy_server.engine.harness import FIRST, INITIAL, Watcher, generate, request, running, until

LENGTHS = (1, 2, 3, 5, 7, 8, 11, 16, 23, 30)
LONG = list(range(100))
PIECE = 4


def prompt_of(length: int) -> list[int]:
    return [random.Random(length).randrange(VOCAB - 1) for _ in range(length)]


def by_transformers(model: PreTrainedModel) -> dict[int, list[int]]:
    tokens = {}
    for length in LENGTHS:
        ids = torch.tensor([prompt_of(length)])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new_tokens(length),
            pad_token_id=EOS,
        )
        tokens[length] = output[0, length:].tolist()
    return tokens


def new_tokens(length: int) -> int:
    return 3 + length % 7


@pytest.mark.parametrize("architecture", sorted(CONFIGS))
async def test_greedy_tokens_are_those_of_transformers_in_pieces_and_whole_alone_and_among_64_before_and_after_a_swap(
    architecture: str,
) -> None:
    model, other = make_model(architecture), make_model(architecture, seed=1)
    new = {name: parameter.detach().clone() for name, parameter in other.named_parameters()}
    expected = [by_transformers(model), by_transformers(other)]
    for prefill_tokens in (PIECE, 64 * max(LENGTHS)):
        async with running(
            loaded(make_model(architecture)), max_batch_rows=64, prefill_tokens=prefill_tokens
        ) as engine:

            async def greedy(length: int) -> list[int]:
                asked = request(prompt_of(length), temperature=0.0, max_new_tokens=new_tokens(length))
                [completion] = await generate(engine, asked)
                return completion.token_ids

            for swaps, tokens in enumerate(expected):
                if swaps:
                    await engine.load_weights(new, FIRST, if_current=INITIAL, in_flight=InFlight.RECOMPUTE)
                assert await greedy(LENGTHS[-1]) == tokens[LENGTHS[-1]]
                lengths = [LENGTHS[place % len(LENGTHS)] for place in range(64)]
                assert await asyncio.gather(*map(greedy, lengths)) == [tokens[length] for length in lengths]


async def held_in_its_run(engine: BatchEngine, watcher: Watcher) -> TokenStream:
    """A completion of 120 tokens, at whose first step the engine stands still."""
    watcher.pause_after(1)
    runs = engine.submit(request([1], max_new_tokens=120, min_new_tokens=120))
    await until(lambda: watcher.held)
    return runs


async def test_what_runs_gets_its_tokens_while_a_long_prompt_is_read() -> None:
    watcher = Watcher()
    async with running(loaded(make_model("gpt2")), prefill_tokens=PIECE, observer=watcher) as engine:
        runs = await held_in_its_run(engine, watcher)
        steps = len(watcher.decoded_batches)
        long = asyncio.create_task(generate(engine, request(LONG, max_new_tokens=1)))
        await asyncio.sleep(0)
        watcher.resume()
        [completion] = await long
        assert len(watcher.decoded_batches) - steps >= len(LONG) // PIECE - 1
        await runs.aclose()
    assert len(completion.token_ids) == 1


async def test_an_urgent_prompt_is_read_before_the_rest_of_a_long_one() -> None:
    watcher = Watcher()
    async with running(loaded(make_model("gpt2")), prefill_tokens=PIECE, observer=watcher) as engine:
        runs = await held_in_its_run(engine, watcher)
        bulk = asyncio.create_task(generate(engine, request(LONG, name="bulk", max_new_tokens=1)))
        await asyncio.sleep(0)
        watcher.pause_after(3)
        await until(lambda: watcher.held)
        person = asyncio.create_task(
            generate(engine, request([5, 6], name="person", max_new_tokens=1, priority=Priority.INTERACTIVE))
        )
        await asyncio.sleep(0)
        watcher.resume()
        await person
        assert not bulk.done()
        await bulk
        await runs.aclose()


async def test_a_request_that_is_cancelled_while_its_prompt_is_read_holds_nothing() -> None:
    watcher = Watcher()
    async with running(loaded(make_model("gpt2")), prefill_tokens=PIECE, observer=watcher) as engine:
        runs = await held_in_its_run(engine, watcher)
        gone = engine.submit(request(LONG, name="gone", n=3, max_new_tokens=1))
        stays = asyncio.create_task(generate(engine, request(LONG[::-1], name="stays", max_new_tokens=2)))
        await asyncio.sleep(0)
        watcher.pause_after(3)
        await until(lambda: watcher.held)
        await gone.aclose()
        watcher.pause_after(60)  # more than the other prompt takes, fewer than the first completion has left
        [kept] = await stays
        await until(lambda: watcher.held)
        await runs.aclose()
        watcher.resume()
        await until(lambda: watcher.rows == 0)
        [alone] = await generate(engine, request(LONG[::-1], max_new_tokens=2))
    assert watcher.cancelled_completions == 3 + 1
    assert kept.token_ids == alone.token_ids


@pytest.mark.parametrize("in_flight", list(InFlight))
async def test_a_swap_in_the_middle_of_a_prompt(in_flight: InFlight) -> None:
    model, other = make_model("llama"), make_model("llama", seed=1)
    new = {name: parameter.detach().clone() for name, parameter in other.named_parameters()}
    watcher = Watcher()
    asked = request(LONG, name="long", n=2, temperature=0.0, max_new_tokens=4)
    async with running(loaded(model), prefill_tokens=PIECE, observer=watcher, max_queue_requests=1) as engine:
        before = await generate(engine, asked)
        runs = await held_in_its_run(engine, watcher)
        task = asyncio.create_task(generate(engine, asked))
        await asyncio.sleep(0)
        watcher.pause_after(3)
        await until(lambda: watcher.held)
        swap = asyncio.create_task(engine.load_weights(new, FIRST, if_current=None, in_flight=in_flight))
        await asyncio.sleep(0)
        watcher.resume()
        completions = await task
        await runs.aclose()
        await swap
        after = await generate(engine, asked)  # there is room in the queue, for one
    for completion, old, fresh in zip(completions, before, after, strict=True):
        match in_flight:
            case InFlight.RECOMPUTE:
                assert (completion.token_ids, set(completion.spans)) == (fresh.token_ids, {VersionSpan(FIRST, 1)})
            case InFlight.WAIT:
                assert (completion.token_ids, set(completion.spans)) == (old.token_ids, {VersionSpan(INITIAL, 1)})
            case InFlight.KEEP_CACHE:
                assert set(completion.spans) == {VersionSpan(FIRST, 1, oldest_cache=INITIAL)}
            case InFlight.ABORT:
                assert (completion.token_ids, completion.finish_reason) == ([], FinishReason.ABORTED)
