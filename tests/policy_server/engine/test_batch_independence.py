"""A seeded request gives the same tokens alone and in a full batch, but for ties by rounding, which are counted."""

from __future__ import annotations

import asyncio
import random

import pytest
import torch
from transformers import PreTrainedModel

from policy_server.engine.protocol import GenerationRequest
from tests.policy_server.engine.architectures import loaded, make_model
from tests.policy_server.engine.harness import Gathered, Watcher, generate, request, running

LENGTH = 30
ROWS = 16
FINAL_NORM = {"gpt2": "transformer.ln_f.weight", "llama": "model.norm.weight"}
SHARPNESS = {"flat": 0.1, "peaked": 4.0}
"""By how much the logits are larger than a random model's."""


def make_sharpened(architecture: str, sharpness: str) -> PreTrainedModel:
    model = make_model(architecture)
    with torch.no_grad():
        model.get_parameter(FINAL_NORM[architecture]).mul_(SHARPNESS[sharpness])
    return model


def seeded(count: int) -> list[GenerationRequest]:
    source = random.Random(9)
    return [
        request(
            [source.randrange(256) for _ in range(source.randint(1, 40))],
            name=f"{index}",
            seed=source.getrandbits(64),
            temperature=source.choice([0.0, 0.7, 1.0, 1.0, 1.4]),
            top_k=source.choice([0, 0, 50]),
            top_p=source.choice([1.0, 1.0, 0.9]),
            repetition_penalty=source.choice([1.0, 1.0, 1.2]),
            max_new_tokens=LENGTH,
            min_new_tokens=LENGTH,
        )
        for index in range(count)
    ]


@pytest.mark.parametrize("count", [25, pytest.param(1000, marks=pytest.mark.slow)], ids=["some", "many"])
@pytest.mark.parametrize("sharpness", SHARPNESS)
@pytest.mark.parametrize("architecture", FINAL_NORM)
async def test_a_seeded_request_gives_the_same_tokens_alone_and_in_a_full_batch(
    architecture: str, sharpness: str, count: int
) -> None:
    asked = seeded(count)
    async with running(loaded(make_sharpened(architecture, sharpness))) as engine:
        alone = [(await generate(engine, each))[0] for each in asked]
    watcher = Watcher()
    async with running(
        loaded(make_sharpened(architecture, sharpness)), max_batch_rows=ROWS, observer=watcher
    ) as engine:
        answers = await asyncio.gather(*(generate(engine, each) for each in asked))
    assert ROWS in watcher.decoded_batches
    tokens = sum(len(each.token_ids) for each in alone)
    assert tokens == count * LENGTH
    ties = [first_difference(one, other) for one, [other] in zip(alone, answers, strict=True)]
    parted = [at for at in ties if at is not None]
    print(f"{architecture}, {sharpness}: {len(parted)} completions of {tokens} tokens part, at {parted}")
    assert len(parted) <= max(tokens // 10_000, 2)


def first_difference(one: Gathered, other: Gathered) -> int | None:
    """Where two completions part; what they are told until there must agree."""
    pairs = zip(one.token_ids, other.token_ids, strict=True)
    at = next((place for place, (left, right) in enumerate(pairs) if left != right), None)
    assert one.raw_logprobs[:at] == pytest.approx(other.raw_logprobs[:at], abs=1e-4)
    assert one.processed_logprobs[:at] == pytest.approx(other.processed_logprobs[:at], abs=1e-4)
    return at
