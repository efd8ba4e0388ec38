"""Generation in this process: padding is invisible, completions end at their own EOS."""

from pathlib import Path

import pytest
import torch
from transformers import StopStringCriteria

from tests.support.models import make_byte_tokenizer, make_tiny_gpt2
from trainer.model import AutoModelForCausalLMWithValueHead
from trainer.quickstart.generation import generate_batched, generate_one

EOS = 256
GREEDY = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": EOS}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> AutoModelForCausalLMWithValueHead:
    return AutoModelForCausalLMWithValueHead.from_pretrained(make_tiny_gpt2(tmp_path_factory.mktemp("model")))


@pytest.fixture
def always_eos(tmp_path: Path) -> AutoModelForCausalLMWithValueHead:
    model = AutoModelForCausalLMWithValueHead.from_pretrained(make_tiny_gpt2(tmp_path, tie=False))
    with torch.no_grad():
        model.pretrained_model.lm_head.weight.zero_()
        model.pretrained_model.transformer.ln_f.bias.fill_(1.0)
        model.pretrained_model.lm_head.weight[EOS] = 1.0
    return model


def prompts(*lengths: int) -> list[torch.Tensor]:
    return [torch.arange(length) + 40 + length for length in lengths]


def test_left_padding_changes_nothing_about_a_completion(model: AutoModelForCausalLMWithValueHead) -> None:
    queries = prompts(1, 7, 3, 12, 4)

    batched = generate_batched(
        model, queries, pad_id=EOS, batch_size=3, return_prompt=False, length_sampler=None, settings=GREEDY
    )

    for query, completion in zip(queries, batched, strict=True):
        alone = generate_one(model, query, return_prompt=False, settings=GREEDY)
        assert completion.tolist() == alone[0].tolist()


@pytest.mark.parametrize("return_prompt", [True, False])
def test_an_eos_inside_the_prompt_is_no_end(model: AutoModelForCausalLMWithValueHead, return_prompt: bool) -> None:
    query = torch.tensor([50, EOS, 51])

    [row] = generate_batched(
        model, [query], pad_id=EOS, batch_size=4, return_prompt=return_prompt, length_sampler=None, settings=GREEDY
    )

    assert row.numel() == 6 + 3 * return_prompt
    if return_prompt:
        assert row[:3].tolist() == query.tolist()


def test_a_completion_keeps_its_eos_and_loses_the_padding_after_it(
    always_eos: AutoModelForCausalLMWithValueHead,
) -> None:
    rows = generate_batched(
        always_eos, prompts(2, 5), pad_id=EOS, batch_size=2, return_prompt=False, length_sampler=None, settings=GREEDY
    )

    assert [row.tolist() for row in rows] == [[EOS], [EOS]]


def test_an_eos_id_given_with_the_call_replaces_the_models(always_eos: AutoModelForCausalLMWithValueHead) -> None:
    [row] = generate_batched(
        always_eos,
        prompts(2),
        pad_id=0,
        batch_size=1,
        return_prompt=False,
        length_sampler=None,
        settings={**GREEDY, "eos_token_id": [7, 9]},
    )

    assert row.tolist() == [EOS] * 6


def test_each_batch_asks_the_length_sampler_anew(model: AutoModelForCausalLMWithValueHead) -> None:
    lengths = iter([2, 5, 3])

    rows = generate_batched(
        model,
        prompts(3, 3, 3, 3, 3),
        pad_id=EOS,
        batch_size=2,
        return_prompt=False,
        length_sampler=lambda: next(lengths),
        settings=GREEDY,
    )

    assert [row.numel() for row in rows] == [2, 2, 5, 5, 3]


def test_rows_that_a_stop_string_ends_are_not_mistaken_for_padding(model: AutoModelForCausalLMWithValueHead) -> None:
    tokenizer = make_byte_tokenizer()
    queries = prompts(3, 6)
    plain = [generate_one(model, query, return_prompt=False, settings=GREEDY)[0] for query in queries]
    stop = tokenizer.decode(plain[0][1:2])
    criteria = StopStringCriteria(tokenizer, [stop])

    rows = generate_batched(
        model,
        queries,
        pad_id=EOS,
        batch_size=2,
        return_prompt=False,
        length_sampler=None,
        settings={**GREEDY, "stopping_criteria": [criteria]},
    )

    assert rows[0].tolist() == plain[0][: rows[0].numel()].tolist()
    assert rows[0].numel() <= 2


def test_several_sequences_per_query_are_refused_for_lists(model: AutoModelForCausalLMWithValueHead) -> None:
    with pytest.raises(ValueError, match="num_return_sequences"):
        generate_batched(
            model,
            prompts(2),
            pad_id=EOS,
            batch_size=1,
            return_prompt=True,
            length_sampler=None,
            settings={**GREEDY, "num_return_sequences": 2},
        )


def test_dropout_is_off_inside_and_every_modules_mode_comes_back(model: AutoModelForCausalLMWithValueHead) -> None:
    layer = model.pretrained_model.transformer.h[0]
    layer.training = True  # as gradient checkpointing leaves it
    try:
        first = generate_one(model, prompts(4)[0], return_prompt=True, settings=GREEDY)
        assert layer.training
        assert not layer.mlp.training
    finally:
        layer.training = False
    assert torch.equal(first, generate_one(model, prompts(4)[0], return_prompt=True, settings=GREEDY))
