from __future__ import annotations

import torch
from transformers.activations import NewGELUActivation

from trainer.responses.activations import fuse_activations, gelu


def test_gelu_is_bit_for_bit_that_of_transformers() -> None:
    inputs = 3 * torch.randn(200, 30, generator=torch.Generator().manual_seed(0))
    inputs[0, :4] = torch.tensor([0.0, 1e-20, 50.0, -50.0])
    assert torch.equal(gelu(inputs), NewGELUActivation()(inputs))


def test_its_gradient_is_that_of_the_formula() -> None:
    inputs = torch.randn(40, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(gelu, inputs)


def test_only_gelus_by_tanh_are_replaced() -> None:
    model = torch.nn.Sequential(NewGELUActivation(), torch.nn.GELU())
    fuse_activations(model)
    assert model[0].forward is gelu
    assert model[1].forward != gelu
