from __future__ import annotations

import asyncio
import random

import pytest
import torch
from transformers import PreTrainedModel

from policy_server.engine.protocol import FinishReason
from tests.policy_server.engine.architectures import CONFIGS, EOS, VOCAB, loaded, make_model
from tests.policy_server.engine.harness import Gathered, Watcher, generate, request, running

pytestmark = pytest.mark.usefixtures("each_engine")

PROMPTS = [[random.Random(length).randrange(VOCAB - 1) for _ in range(length)] for length in (1, 3, 4, 9, 17, 30)]


def generated_by_transformers(model: PreTrainedModel, prompt: list[int], max_new_tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=EOS,
    )
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("architecture", sorted(CONFIGS))
async def test_greedy_tokens_of_mixed_lengths_in_one_batch_are_those_of_transformers_alone(architecture: str) -> None:
    model = make_model(architecture)
    lengths = (12, 20, 5, 16, 9, 14)
    watcher = Watcher()
    async with running(loaded(model), max_batch_rows=4, observer=watcher) as engine:
        answers = await asyncio.gather(
            *(
                generate(engine, request(prompt, temperature=0.0, max_new_tokens=length))
                for prompt, length in zip(PROMPTS, lengths, strict=True)
            )
        )
    for prompt, length, [completion] in zip(PROMPTS, lengths, answers, strict=True):
        assert completion.token_ids == generated_by_transformers(model, prompt, length)
        assert completion.processed_logprobs == [0.0] * len(completion.token_ids)
    assert max(watcher.decoded_batches) > 1


@pytest.mark.parametrize("architecture", ["gpt2", "qwen2", "gemma2"])
async def test_bfloat16_generates_finite_logprobs(architecture: str) -> None:
    async with running(loaded(make_model(architecture, dtype=torch.bfloat16))) as engine:
        completions = await generate(engine, request([1, 2, 3], n=3, max_new_tokens=10))
    assert all(logprob <= 0.0 for completion in completions for logprob in completion.raw_logprobs)


async def test_a_seeded_completion_is_the_same_alone_and_among_others() -> None:
    models = loaded(make_model("qwen2"))
    asked = request(PROMPTS[3], n=3, seed=2**64 - 2, max_new_tokens=15, temperature=0.8, top_k=40, top_p=0.95)
    others = [request(prompt, name=f"{i}", n=2, seed=i, max_new_tokens=20) for i, prompt in enumerate(PROMPTS)]
    async with running(models) as engine:
        alone = await generate(engine, asked)
        first, *_ = await asyncio.gather(generate(engine, asked), *(generate(engine, other) for other in others))
    assert [each.token_ids for each in first] == [each.token_ids for each in alone]
    for one, another in zip(first, alone, strict=True):
        assert one.processed_logprobs == pytest.approx(another.processed_logprobs, abs=1e-4)


async def test_completion_i_of_a_seed_is_completion_0_of_the_seed_plus_i() -> None:
    async with running(loaded(make_model("llama"))) as engine:
        together = await generate(engine, request([5, 6], n=3, seed=2**64 - 1, max_new_tokens=12))
        for index, seed in enumerate((2**64 - 1, 0, 1)):
            [alone] = await generate(engine, request([5, 6], seed=seed, max_new_tokens=12))
            assert alone.token_ids == together[index].token_ids
    assert together[0].token_ids != together[1].token_ids


async def test_a_completion_prefix_goes_on_as_if_never_interrupted() -> None:
    settings = {"seed": 11, "max_new_tokens": 20, "repetition_penalty": 1.2, "min_new_tokens": 10}
    async with running(loaded(make_model("gpt2"))) as engine:
        [whole] = await generate(engine, request([7, 8, 9], **settings))
        [rest] = await generate(engine, request([7, 8, 9], completion_prefix=tuple(whole.token_ids[:8]), **settings))
    assert rest.token_ids == whole.token_ids[8:]
    assert rest.processed_logprobs == pytest.approx(whole.processed_logprobs[8:], abs=1e-4)
    assert rest.finish_reason is whole.finish_reason


async def test_a_prefix_that_used_up_its_tokens_ends_at_once() -> None:
    async with running(loaded(make_model("gpt2"))) as engine:
        [completion] = await generate(engine, request([7], completion_prefix=(1, 2, 3), max_new_tokens=3))
    assert (completion.token_ids, completion.finish_reason) == ([], FinishReason.LENGTH)


async def test_raw_and_processed_logprobs_are_those_of_a_plain_forward() -> None:
    model = make_model("gpt_neox")
    prompt, temperature = [3, 1, 4], 0.7
    async with running(loaded(model)) as engine:
        [completion] = await generate(engine, request(prompt, temperature=temperature, max_new_tokens=12, seed=5))
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion.token_ids])).logits[0, len(prompt) - 1 : -1]
    chosen = torch.tensor(completion.token_ids).unsqueeze(-1)
    raw = logits.log_softmax(-1).gather(-1, chosen).squeeze(-1)
    processed = (logits / temperature).log_softmax(-1).gather(-1, chosen).squeeze(-1)
    assert completion.raw_logprobs == pytest.approx(raw.tolist(), abs=1e-4)
    assert completion.processed_logprobs == pytest.approx(processed.tolist(), abs=1e-4)


async def test_logprobs_come_only_when_asked_for() -> None:
    async with running(loaded(make_model("gpt2"))) as engine:
        [neither] = await generate(engine, request([1], max_new_tokens=4, raw_logprobs=False, processed_logprobs=False))
        [raw] = await generate(engine, request([1], max_new_tokens=4, processed_logprobs=False))
    assert (neither.raw_logprobs, neither.processed_logprobs, raw.processed_logprobs) == ([], [], [])
    assert len(raw.raw_logprobs) == 4


async def test_more_completions_than_rows_all_arrive() -> None:
    watcher = Watcher()
    async with running(loaded(make_model("gpt2")), max_batch_rows=3, observer=watcher) as engine:
        completions = await generate(engine, request([1, 2], n=10, max_new_tokens=6, min_new_tokens=6))
        singles = [await generate(engine, request([1, 2], seed=i, max_new_tokens=6, min_new_tokens=6)) for i in (4, 9)]
    assert [len(each.token_ids) for each in completions] == [6] * 10
    assert [completions[4].token_ids, completions[9].token_ids] == [single[0].token_ids for single in singles]
    assert watcher.most_rows == 3


async def test_a_context_that_is_used_up_ends_by_length() -> None:
    async with running(loaded(make_model("gpt2")), max_context_tokens=16) as engine:
        assert engine.describe("policy").max_context_tokens == 16
        [completion] = await generate(engine, request(range(10), max_new_tokens=50, min_new_tokens=50))
    assert (len(completion.token_ids), completion.finish_reason) == (6, FinishReason.LENGTH)


async def test_eos_is_the_last_token_and_impossible_before_min_new_tokens() -> None:
    asked = {"n": 16, "max_new_tokens": 60, "temperature": 3.0, "seed": 1}
    async with running(loaded(make_model("gpt2"))) as engine:
        free = await generate(engine, request([1, 2], **asked))
        held = await generate(engine, request([1, 2], min_new_tokens=60, **asked))
    ended = [each for each in free if each.finish_reason is FinishReason.EOS]
    assert ended
    assert all(each.token_ids.index(EOS) == len(each.token_ids) - 1 for each in ended)
    assert all(EOS not in each.token_ids for each in free if each.finish_reason is not FinishReason.EOS)
    assert all(each.finish_reason is FinishReason.LENGTH for each in held)
    assert all(EOS not in each.token_ids for each in held)


async def test_a_stop_token_ends_the_completion_and_is_kept() -> None:
    async with running(loaded(make_model("llama"))) as engine:
        [free] = await generate(engine, request([1, 2], seed=3, max_new_tokens=20))
        stop = free.token_ids[5]
        [stopped] = await generate(engine, request([1, 2], seed=3, max_new_tokens=20, stop_token_ids=frozenset({stop})))
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(stop) + 1]
    assert (stopped.finish_reason, stopped.stop_string) == (FinishReason.STOP, "")


async def test_a_stop_string_across_tokens_is_cut_from_the_text_but_not_from_the_tokens() -> None:
    letters = frozenset(range(VOCAB)) - frozenset(range(32, 90))
    async with running(loaded(_only_letters(make_model("gpt2"), letters))) as engine:
        [free] = await generate(engine, request([40], seed=8, max_new_tokens=30))
        stop = free.text[10:13]
        [stopped] = await generate(engine, request([40], seed=8, max_new_tokens=30, stop_strings=("never", stop)))
    end = free.text.index(stop)
    assert stopped.text == free.text[:end]
    assert stopped.token_ids == free.token_ids[: end + 3]
    assert (stopped.finish_reason, stopped.stop_string) == (FinishReason.STOP, stop)


async def test_a_stop_string_may_begin_in_the_completion_prefix() -> None:
    letters = frozenset(range(VOCAB)) - frozenset(range(32, 90))
    async with running(loaded(_only_letters(make_model("gpt2"), letters))) as engine:
        asked = {"seed": 8, "max_new_tokens": 30}
        [free] = await generate(engine, request([40], **asked))
        stop = free.text[10:13]
        cut = free.text.index(stop) + 2
        prefix = tuple(free.token_ids[:cut])
        [rest] = await generate(engine, request([40], completion_prefix=prefix, stop_strings=(stop,), **asked))
    assert (rest.token_ids, rest.text) == ([free.token_ids[cut]], "")
    assert rest.finish_reason is FinishReason.STOP


async def test_text_is_what_the_tokenizer_decodes() -> None:
    models = loaded(make_model("gpt2"))
    async with running(models) as engine:
        completions = await generate(engine, request([1, 2], n=8, max_new_tokens=60, temperature=2.0))
    for completion in completions:
        assert completion.text == models.tokenizer.decode(completion.token_ids, skip_special_tokens=True)


async def test_a_stream_interval_makes_fewer_and_larger_deltas_of_the_same_tokens() -> None:
    async with running(loaded(make_model("gpt2"))) as engine:
        asked = {"n": 2, "max_new_tokens": 10, "min_new_tokens": 10, "seed": 4}
        each = await generate(engine, request([1, 2], **asked))
        three = await generate(engine, request([1, 2], stream_interval=3, **asked))
        whole = await generate(engine, request([1, 2], stream_interval=100, **asked))
    assert [completion.deltas for completion in each + three + whole] == [10, 10, 4, 4, 1, 1]
    assert _without_deltas(each) == _without_deltas(three) == _without_deltas(whole)


async def test_the_reference_generates_under_its_own_weights() -> None:
    policy, reference = make_model("gpt2", seed=0), make_model("gpt2", seed=1)
    async with running(loaded(policy, reference)) as engine:
        of_reference, of_policy = await asyncio.gather(
            generate(engine, request([1, 2], temperature=0.0, model="reference", max_new_tokens=8)),
            generate(engine, request([1, 2], temperature=0.0, max_new_tokens=8)),
        )
    assert of_reference[0].token_ids == generated_by_transformers(reference, [1, 2], 8)
    assert of_policy[0].token_ids == generated_by_transformers(policy, [1, 2], 8)


async def test_sampling_a_model_gives_its_distribution() -> None:
    model = make_model("gpt2")
    with torch.no_grad():
        expected = torch.softmax(model(torch.tensor([[9, 9]])).logits[0, -1].double(), dim=-1)
    count = 1500
    async with running(loaded(model), max_batch_rows=500) as engine:
        completions = await generate(
            engine, request([9, 9], n=count, max_new_tokens=1, raw_logprobs=False, processed_logprobs=False)
        )
    drawn = torch.bincount(torch.tensor([each.token_ids[0] for each in completions]), minlength=VOCAB).double()
    common = expected * count >= 5
    observed = torch.cat([drawn[common], drawn[~common].sum().unsqueeze(0)])
    wanted = torch.cat([expected[common], expected[~common].sum().unsqueeze(0)]) * count
    statistic = float(((observed - wanted) ** 2 / wanted).sum())
    degrees = len(wanted) - 1
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5


def _only_letters(model: PreTrainedModel, forbidden: frozenset[int]) -> PreTrainedModel:
    """Make some tokens practically impossible: the tied head of GPT-2 sees a constant in the last channel."""
    with torch.no_grad():
        model.transformer.ln_f.weight[-1] = 0.0
        model.transformer.ln_f.bias[-1] = 1.0
        model.transformer.wte.weight[:, -1] = 0.0
        model.transformer.wte.weight[sorted(forbidden), -1] = -1e4
    return model


def _without_deltas(completions: list[Gathered]) -> list[tuple[object, ...]]:
    return [(each.token_ids, each.text, each.raw_logprobs, each.finish_reason) for each in completions]
