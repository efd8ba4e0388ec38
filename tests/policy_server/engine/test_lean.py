"""Decode steps that are written out give what the modules' own forwards give, and are left where they would not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, LlamaConfig, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from policy_server.engine import cache as caches
from policy_server.engine.lean import lean_forward
from policy_server.engine.linears import PackedLinears
from policy_server.engine.model import ServedModel
from tests.policy_server.engine.architectures import COMMON, CONFIGS, SIZES, VOCAB, make_model, model_from

WRITTEN_OUT = ["gpt2", "llama", "mistral", "qwen2", "qwen3"]
LENGTHS = [3, 9, 6, 1]


def start(model: PreTrainedModel) -> tuple[Cache, Tensor]:
    """A cache of rows of several lengths, and its mask."""
    random = torch.Generator().manual_seed(2)
    width = max(LENGTHS)
    token_ids = torch.randint(0, VOCAB, (len(LENGTHS), width), generator=random)
    mask = (torch.arange(width) >= width - torch.tensor(LENGTHS).unsqueeze(-1)).long()
    cache = caches.new_cache(model.config, growing=True)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    model(input_ids=token_ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
    return cache, mask


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("architecture", WRITTEN_OUT)
@torch.inference_mode()
def test_every_step_has_the_logits_of_the_modules_own_forward(architecture: str, packed: bool) -> None:
    model, plain = make_model(architecture), make_model(architecture)
    if packed:
        PackedLinears(model)
    lean = lean_forward(model)
    assert lean is not None
    (ours, mask), (theirs, _) = start(model), start(plain)
    token_ids = torch.tensor([5, 6, 7, 8])
    for step in range(80):  # past the room that the cache begins with
        if step == 10:
            for cache in (ours, theirs):
                caches.select(cache, [0, 3, 2], torch.device("cpu"))
            token_ids, mask = token_ids[[0, 3, 2]], mask[[0, 3, 2]]
        mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=torch.long)], dim=-1)
        positions = mask.sum(-1) - 1
        expected = plain(
            input_ids=token_ids.unsqueeze(-1),
            attention_mask=mask,
            position_ids=positions.unsqueeze(-1),
            past_key_values=theirs,
            use_cache=True,
        ).logits[:, -1]
        logits = lean.logits(token_ids, positions, mask, ours)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        token_ids = expected.argmax(-1)


def test_rows_without_padding_need_no_mask() -> None:
    model = make_model("qwen2")
    lean = lean_forward(model)
    assert lean is not None
    token_ids = torch.arange(10).view(2, 5)
    with torch.inference_mode():
        cache = caches.new_cache(model.config, growing=True)
        model(input_ids=token_ids[:, :-1], past_key_values=cache, use_cache=True)
        logits = lean.logits(token_ids[:, -1], torch.tensor([4, 4]), torch.ones_like(token_ids), cache)
        expected = model(input_ids=token_ids).logits[:, -1]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        lambda: GPT2Config(n_embd=32, n_layer=2, n_head=4, activation_function="relu", **COMMON),
        lambda: LlamaConfig(num_key_value_heads=2, hidden_act="gelu", **SIZES, **COMMON),
        CONFIGS["mistral_sliding"],
        CONFIGS["gemma2"],
        CONFIGS["opt"],
    ],
)
def test_what_is_not_written_out_keeps_its_own_forward(config: Callable[[], PreTrainedConfig]) -> None:
    assert lean_forward(model_from(config())) is None


def test_a_model_that_somebody_changed_keeps_its_own_forward() -> None:
    model = make_model("llama")
    model.model.layers[1].mlp.up_proj = Doubled(model.model.layers[1].mlp.up_proj)
    assert lean_forward(model) is not None  # its layers are asked
    model.model.norm.forward = lambda hidden: hidden
    assert lean_forward(model) is None


class Doubled(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: Tensor) -> Tensor:
        doubled: Tensor = 2 * self.layer(inputs)
        return doubled


@pytest.mark.parametrize(("dtype", "reproducible"), [(torch.bfloat16, False), (torch.float32, True)])
def test_only_full_precision_decodes_by_it_and_no_reproducible_run(dtype: torch.dtype, reproducible: bool) -> None:
    served = ServedModel("policy", make_model("llama", dtype=dtype), weights_digest="", reproducible=reproducible)
    assert served.lean is None
    assert ServedModel("policy", make_model("llama"), weights_digest="").lean is not None
