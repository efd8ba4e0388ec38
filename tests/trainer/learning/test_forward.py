from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.support.models import make_tiny_gpt2
from trainer.learning.forward import (
    collate,
    response_distribution,
    response_distribution_and_values,
    run_without_dropout,
)
from trainer.model import AutoModelForCausalLMWithValueHead

QUERIES = [torch.tensor([1, 2, 3]), torch.tensor([4]), torch.tensor([5, 6])]
RESPONSES = [torch.tensor([7]), torch.tensor([8, 9, 10]), torch.tensor([11, 12])]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> AutoModelForCausalLMWithValueHead:
    folder: Path = make_tiny_gpt2(tmp_path_factory.mktemp("model"))
    return AutoModelForCausalLMWithValueHead.from_pretrained(folder, v_head_init_strategy="normal")


def test_rows_are_padded_on_the_right() -> None:
    rows = collate(QUERIES, RESPONSES, pad_id=99, device=CPU)
    assert rows.input_ids.tolist() == [[1, 2, 3, 7], [4, 8, 9, 10], [5, 6, 11, 12]]
    assert rows.mask.tolist() == [[True, False, False], [True, True, True], [True, True, False]]
    assert rows.padded(torch.arange(1.0, 7.0)).tolist() == [[1, 0, 0], [2, 3, 4], [5, 6, 0]]
    longer = collate(
        [torch.tensor([1]), torch.tensor([2])], [torch.tensor([3, 4]), torch.tensor([5])], pad_id=99, device=CPU
    )
    assert longer.input_ids.tolist() == [[1, 3, 4], [2, 5, 99]]
    assert longer.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]


@torch.no_grad()
def test_a_row_in_a_batch_gives_what_it_gives_alone(model: AutoModelForCausalLMWithValueHead) -> None:
    rows = collate(QUERIES, RESPONSES, pad_id=0, device=CPU)
    distribution, values = response_distribution_and_values(model, rows, 0.7)
    expected, expected_values = [], []
    for query, response in zip(QUERIES, RESPONSES, strict=True):
        logits, _, row_values = model(torch.cat([query, response])[None])
        span = slice(len(query) - 1, len(query) + len(response) - 1)
        expected.append(torch.log_softmax(logits[0, span] / 0.7, -1))
        expected_values.append(row_values[0, span])
    torch.testing.assert_close(distribution, torch.cat(expected))
    torch.testing.assert_close(values, torch.cat(expected_values))
    for reference in (model, model.pretrained_model):
        torch.testing.assert_close(response_distribution(reference, rows, 0.7), distribution)


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
