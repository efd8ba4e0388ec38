from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.models import make_tiny_gpt2
from trainer.model import AutoModelForCausalLMWithValueHead
from trainer.responses.rows import collate
from trainer.responses.scoring import distribution_and_values, response_distribution

QUERIES = [torch.tensor([1, 2, 3]), torch.tensor([4, 5]), torch.tensor([5, 6])]
RESPONSES = [torch.tensor([7]), torch.tensor([8, 9, 10]), torch.tensor([11, 12])]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> AutoModelForCausalLMWithValueHead:
    folder: Path = make_tiny_gpt2(tmp_path_factory.mktemp("model"))
    return AutoModelForCausalLMWithValueHead.from_pretrained(folder, v_head_init_strategy="normal")


@torch.no_grad()
def test_a_row_in_a_batch_gives_what_it_gives_alone(model: AutoModelForCausalLMWithValueHead) -> None:
    rows = collate(QUERIES, RESPONSES, packed=False, pad_id=0, device=torch.device("cpu"))
    distribution, values = distribution_and_values(model, rows, 0.7)
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
