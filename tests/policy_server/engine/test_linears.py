"""Linear layers over copies of their weights compute what they computed without, of the weights as they are now."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from policy_server.engine.linears import PackedLinears, can_pack
from tests.policy_server.engine.architectures import make_model

ARCHITECTURES = ["gpt2", "llama", "gpt_neox", "opt", "mixtral"]


def logits(model: PreTrainedModel, rows: int) -> Tensor:
    token_ids = torch.randint(0, 256, (rows, 1), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        result: Tensor = model(input_ids=token_ids).logits
    return result


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("rows", [1, 64, 300])
def test_the_logits_stay_what_they_were(architecture: str, rows: int) -> None:
    plain = make_model(architecture)
    packed = copy.deepcopy(plain)
    PackedLinears(packed)
    torch.testing.assert_close(logits(packed, rows), logits(plain, rows), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_new_weights_count_once_the_old_copies_are_dropped_under_any_of_a_tied_weights_names(architecture: str) -> None:
    model, other = make_model(architecture), make_model(architecture, seed=1)
    linears = PackedLinears(model)
    new = {name: parameter.detach() for name, parameter in other.named_parameters()}
    with torch.inference_mode():
        for name, parameter in model.named_parameters():
            parameter.data.copy_(new[name])
    assert not torch.allclose(logits(model, 4), logits(other, 4), atol=1e-2)
    linears.drop(new)
    torch.testing.assert_close(logits(model, 4), logits(other, 4), rtol=1e-4, atol=1e-5)
    while linears.stale:
        linears.pack_one()
    torch.testing.assert_close(logits(model, 4), logits(other, 4), rtol=1e-4, atol=1e-5)


def test_only_full_precision_is_packed() -> None:
    assert can_pack(make_model("gpt2"))
    assert not can_pack(make_model("gpt2", dtype=torch.bfloat16))
