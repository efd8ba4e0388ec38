from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from tests.benchmarks.bare_loop import BareLoop
from tests.support.models import make_tiny_gpt2

LENGTHS = [3, 12, 1, 7, 12, 5]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> GPT2LMHeadModel:
    folder = make_tiny_gpt2(tmp_path_factory.mktemp("model"), context=64)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture
def prompts() -> Tensor:
    return torch.randint(0, 256, (len(LENGTHS), 5), generator=torch.Generator().manual_seed(3))


def complete(
    model: GPT2LMHeadModel, prompts: Tensor, uniforms: Tensor | None
) -> tuple[list[list[int]], list[list[float]]]:
    loop = BareLoop(model, rows=len(LENGTHS), prompt_tokens=prompts.shape[1], most_new_tokens=max(LENGTHS))
    return loop.complete(prompts, LENGTHS, uniforms)


def test_its_greedy_tokens_are_those_of_generate(model: GPT2LMHeadModel, prompts: Tensor) -> None:
    tokens, _ = complete(model, prompts, None)
    generated = model.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        max_new_tokens=max(LENGTHS),
        eos_token_id=None,
        pad_token_id=0,
    )[:, prompts.shape[1] :]
    assert tokens == [row[:length].tolist() for row, length in zip(generated, LENGTHS, strict=True)]


def test_a_sampled_token_is_where_its_number_lies_in_the_distribution(model: GPT2LMHeadModel, prompts: Tensor) -> None:
    uniforms = torch.rand(len(LENGTHS), max(LENGTHS), generator=torch.Generator().manual_seed(4))
    tokens, logprobs = complete(model, prompts, uniforms)
    for row, completion in enumerate(tokens):
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompts[row].tolist(), *completion]])).logits[0]
        probabilities = logits[prompts.shape[1] - 1 : -1].double().softmax(dim=-1)
        assert len(probabilities) == len(completion) == LENGTHS[row]
        for step, token in enumerate(completion):
            above = float(probabilities[step, : token + 1].sum())
            below = above - float(probabilities[step, token])
            assert below - 1e-5 <= float(uniforms[row, step]) <= above + 1e-5
            assert logprobs[row][step] == pytest.approx(float(probabilities[step, token].log()), abs=1e-4)
