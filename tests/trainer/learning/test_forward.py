from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from tests.support.models import make_tiny_gpt2
from trainer.learning.forward import run_without_dropout
from trainer.model import AutoModelForCausalLMWithValueHead


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> AutoModelForCausalLMWithValueHead:
    folder: Path = make_tiny_gpt2(tmp_path_factory.mktemp("model"))
    return AutoModelForCausalLMWithValueHead.from_pretrained(folder, v_head_init_strategy="normal")


def test_no_forward_has_dropout_even_when_activations_are_recomputed(
    model: AutoModelForCausalLMWithValueHead,
) -> None:
    model.train()
    run_without_dropout(model, checkpoint_activations=True)
    dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    assert any(dropout.p > 0 for dropout in dropouts)
    assert not any(dropout.training for dropout in dropouts)
    assert any(module.training for module in model.modules())
    run_without_dropout(model, checkpoint_activations=False)
    assert not any(module.training for module in model.modules())


def test_a_layer_with_dropout_of_its_own_is_refused_when_activations_are_recomputed(
    model: AutoModelForCausalLMWithValueHead,
) -> None:
    layer = model.pretrained_model.transformer.h[0]
    layer.dropout = 0.1
    try:
        with pytest.raises(ValueError, match=r"GPT2Block would apply \['dropout'\]"):
            run_without_dropout(model, checkpoint_activations=True)
    finally:
        del layer.dropout


def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear has no layers"):
        run_without_dropout(nn.Linear(1, 1), checkpoint_activations=True)
