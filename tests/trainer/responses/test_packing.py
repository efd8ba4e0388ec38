from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, OPTConfig, PreTrainedModel

from tests.support.models import make_tiny_gpt2
from trainer.model import AutoModelForCausalLMWithValueHead
from trainer.responses.packing import PACKABLE, enable_packing
from trainer.responses.rows import ResponseRows, collate
from trainer.responses.scoring import PackedReference, logprobs_under, scores_and_values

VOCABULARY = 40
SIZES: dict[str, dict[str, Any]] = {
    name: {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    for name in PACKABLE
} | {"gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4}}


def make(name: str, **settings: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        name, vocab_size=VOCABULARY, initializer_range=0.3, bos_token_id=0, eos_token_id=0, **SIZES[name], **settings
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    return model


def rows(*, packed: bool) -> ResponseRows:
    generator = torch.Generator().manual_seed(1)
    queries, responses = (
        [torch.randint(0, VOCABULARY, (length,), generator=generator) for length in lengths]
        for lengths in ((3, 1, 6, 2), (1, 9, 4, 7))
    )
    return collate(queries, responses, packed=packed, pad_id=0, device=torch.device("cpu"))


def judged(model: PreTrainedModel, *, packed: bool) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Log-probabilities, entropies and values, and the gradient of a loss made of the first and the last."""
    torch.manual_seed(2)
    with_head = AutoModelForCausalLMWithValueHead.from_pretrained(model, v_head_init_strategy="normal")
    scores = scores_and_values(with_head, rows(packed=packed), 0.8)
    (scores[0].sum() + scores[2].square().sum()).backward()
    gradients = {name: parameter.grad for name, parameter in with_head.named_parameters()}
    return [each.detach() for each in scores], {name: each for name, each in gradients.items() if each is not None}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *((name, {}) for name in sorted(PACKABLE)),
        ("mistral", {"sliding_window": 4}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}),
        ("gpt2", {"tie_word_embeddings": False, "scale_attn_by_inverse_layer_idx": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "plain",
)
def test_packed_rows_give_the_scores_and_gradients_of_padded_ones(name: str, settings: dict[str, Any]) -> None:
    model = make(name, **settings)
    expected, expected_gradients = judged(copy.deepcopy(model), packed=False)
    assert enable_packing(model)
    scores, gradients = judged(model, packed=True)
    for score, other in zip(scores, expected, strict=True):
        torch.testing.assert_close(score, other, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[parameter], rtol=1e-3, atol=1e-4)


def test_a_model_that_reads_packed_rows_reads_padded_ones_as_before() -> None:
    model = make("gpt2")
    expected, _ = judged(copy.deepcopy(model), packed=False)
    assert enable_packing(model)
    again, _ = judged(model, packed=False)
    assert all(torch.equal(score, other) for score, other in zip(again, expected, strict=True))


def test_a_model_that_reads_packed_rows_generates_as_before() -> None:
    model = make("llama")
    prompt = torch.tensor([[0, 0, 5, 6], [1, 2, 3, 4]])
    asked = {"attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]), "max_new_tokens": 6, "pad_token_id": 0}
    expected = model.generate(prompt, do_sample=False, **asked)
    assert enable_packing(model)
    assert torch.equal(model.generate(prompt, do_sample=False, **asked), expected)


def test_a_copy_of_a_model_that_reads_packed_rows_computes_with_its_own_weights() -> None:
    model = make("gpt2")
    assert enable_packing(model)
    twin = copy.deepcopy(model)
    before = logprobs_under(PackedReference(twin), rows(packed=True), 1.0).detach()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(logprobs_under(PackedReference(twin), rows(packed=True), 1.0), before)


def test_nothing_of_it_is_in_the_saved_model(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_tiny_gpt2(tmp_path / "plain"))
    assert enable_packing(model)
    model.save_pretrained(tmp_path / "saved")
    assert "packed_rows" not in (tmp_path / "saved" / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved").config._attn_implementation == "sdpa"


def test_the_last_mlp_computes_only_what_is_asked_about() -> None:
    model = make("gpt2")
    assert enable_packing(model)
    seen: list[int] = []
    for block in model.transformer.h:
        block.mlp.c_fc.register_forward_hook(lambda _module, _inputs, output: seen.append(output.shape[1]))
    packed = rows(packed=True)
    logprobs_under(PackedReference(model), packed, 1.0)
    assert seen == [packed.input_ids.shape[1], len(packed.tokens)]


def test_other_architectures_and_other_attention_are_left_alone() -> None:
    opt = AutoModelForCausalLM.from_config(
        OPTConfig(vocab_size=40, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2)
    )
    assert not enable_packing(opt)
    assert not enable_packing(make("gpt2", attn_implementation="eager"))
