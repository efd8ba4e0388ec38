from __future__ import annotations

import math

import pytest
import torch

from trainer.ppo.logprobs import entropy, log_distribution, token_logprobs


def test_temperature_divides_the_logits() -> None:
    logits = torch.tensor([[1.0, 2.0, 4.0]])
    torch.testing.assert_close(log_distribution(logits, 2.0), torch.log_softmax(logits / 2, -1))
    assert torch.equal(log_distribution(logits, 1.0), torch.log_softmax(logits, -1))


def test_each_token_gets_its_own_log_probability() -> None:
    distribution = torch.tensor([[0.1, 0.9], [0.3, 0.7]]).log()
    torch.testing.assert_close(token_logprobs(distribution, torch.tensor([1, 0])), torch.tensor([0.9, 0.3]).log())


def test_entropy_is_largest_for_a_uniform_and_0_for_a_certain_distribution() -> None:
    distribution = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.0, 1.0, 0.0, 0.0]]).log()
    assert entropy(distribution).tolist() == pytest.approx([math.log(4), 0.0])
