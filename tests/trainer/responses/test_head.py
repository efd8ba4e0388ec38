from __future__ import annotations

import pytest
import torch

from trainer.responses import head
from trainer.responses.head import head_logprobs


@pytest.mark.parametrize(
    ("positions", "columns", "kept_bytes"),
    [(512, 4096, 2**28), (16, 7, 0), (16, 7, 3000)],
    ids=["one block", "blocks computed again", "some blocks kept"],
)
@pytest.mark.parametrize("with_bias", [True, False])
def test_blocks_make_the_log_probabilities_entropies_and_gradients_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, positions: int, columns: int, kept_bytes: int, with_bias: bool
) -> None:
    monkeypatch.setattr(head, "_POSITIONS", positions)
    monkeypatch.setattr(head, "_COLUMNS", columns)
    monkeypatch.setattr(head, "_KEPT_BYTES", kept_bytes)
    torch.manual_seed(0)
    hidden, weight, bias = (torch.randn(size, requires_grad=True) for size in ((37, 16), (50, 16), (50,)))
    tokens, upstream = torch.randint(0, 50, (37,)), torch.randn(37)
    learned = [hidden, weight, bias] if with_bias else [hidden, weight]

    logprobs, entropies = head_logprobs(hidden, weight, bias if with_bias else None, tokens, 0.7)

    logits = hidden @ weight.t() + (bias if with_bias else 0.0)
    distribution = torch.distributions.Categorical(logits=logits / 0.7)
    torch.testing.assert_close(logprobs, distribution.log_prob(tokens), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropies, distribution.entropy(), rtol=1e-5, atol=1e-5)
    assert not entropies.requires_grad
    expected = torch.autograd.grad(distribution.log_prob(tokens), learned, upstream)
    for gradient, other in zip(torch.autograd.grad(logprobs, learned, upstream), expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-5, atol=2e-5)


def test_far_logits_neither_overflow_nor_lose_the_entropy() -> None:
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[-3e4], [3e4], [3e4]])
    logprobs, entropies = head_logprobs(hidden, weight, None, torch.tensor([1]), 1.0)
    torch.testing.assert_close(logprobs, torch.tensor([0.5]).log())
    torch.testing.assert_close(entropies, torch.tensor([2.0]).log())


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden = torch.randn(3, 4, requires_grad=True)
    logprobs, _ = head_logprobs(hidden, torch.randn(9, 4), None, torch.tensor([0, 4, 8]), 1.0)
    logprobs.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.abs().sum() > 0
