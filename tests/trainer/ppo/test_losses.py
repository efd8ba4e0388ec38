from __future__ import annotations

import pytest
import torch
from hypothesis import given
from torch import Tensor

from tests.trainer.ppo.strategies import masked
from trainer.ppo.losses import policy_loss, value_loss
from trainer.ppo.masked import masked_mean


def policy_gradient(log_ratio: float, advantage: float) -> tuple[float, float]:
    """Loss of one token and its derivative by the token's log-probability."""
    logprobs = torch.tensor([[log_ratio]], requires_grad=True)
    one = torch.ones(1, 1)
    loss = policy_loss(logprobs, torch.zeros(1, 1), advantage * one, one, cliprange=0.2).loss
    loss.backward()
    return loss.item(), logprobs.grad.item()


def test_at_the_old_policy_the_gradient_is_the_advantage() -> None:
    assert policy_gradient(0.0, 3.0) == (-3.0, -3.0)
    assert policy_gradient(0.0, -3.0) == (3.0, 3.0)


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "moves"),
    [(0.3, 1.0, False), (0.3, -1.0, True), (-0.3, 1.0, True), (-0.3, -1.0, False), (0.1, 1.0, True), (0.1, -1.0, True)],
)
def test_the_clip_stops_only_moves_that_went_far_enough_the_right_way(
    log_ratio: float, advantage: float, moves: bool
) -> None:
    assert (policy_gradient(log_ratio, advantage)[1] != 0) == moves


@given(masked(tensors=3))
def test_the_clipped_policy_loss_is_never_below_the_unclipped(tensors: tuple[Tensor, ...]) -> None:
    logprobs, old, advantages, mask = tensors
    result = policy_loss(logprobs, old, advantages, mask, cliprange=0.2)
    unclipped = masked_mean(-advantages * (logprobs - old).exp(), mask)
    assert result.loss >= unclipped - 1e-9 * unclipped.abs()
    assert 0 <= result.clip_fraction <= 1


@given(masked(tensors=3))
def test_what_lies_outside_the_mask_does_not_matter(tensors: tuple[Tensor, ...]) -> None:
    logprobs, old, advantages, mask = tensors
    other = torch.where(mask.bool(), logprobs, 1e4)
    first = policy_loss(logprobs, old, advantages, mask, cliprange=0.2)
    second = policy_loss(other, old, advantages, mask, cliprange=0.2)
    for name in ("loss", "mean_ratio", "clip_fraction", "approximate_kl", "policy_kl"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    here, there = (value_loss(values, old, advantages, mask, cliprange=0.2) for values in (logprobs, other))
    assert torch.equal(here.loss, there.loss)


def test_the_policy_statistics_are_means_over_tokens() -> None:
    logprobs, old = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -1.0]])
    result = policy_loss(logprobs, old, torch.ones(1, 2), torch.ones(1, 2), cliprange=0.2)
    assert result.policy_kl.item() == pytest.approx((-0.5 + 1.0) / 2)
    assert result.approximate_kl.item() == pytest.approx((0.25 + 1.0) / 4)
    assert result.clip_fraction.item() == 0.5


def test_the_value_loss_takes_the_worse_of_both_errors() -> None:
    values = torch.tensor([[1.0]])
    old, returns, mask = torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1)
    result = value_loss(values, old, returns, mask, cliprange=0.2)
    assert result.loss.item() == pytest.approx(0.5 * 0.8**2)
    assert result.clip_fraction == 1
    assert result.error == 0


@given(masked(tensors=3))
def test_a_wide_value_clip_leaves_half_the_squared_error(tensors: tuple[Tensor, ...]) -> None:
    values, old, returns, mask = tensors
    result = value_loss(values, old, returns, mask, cliprange=100.0)
    torch.testing.assert_close(result.loss, 0.5 * masked_mean((values - returns) ** 2, mask))
    torch.testing.assert_close(result.error, 2 * result.loss)
    assert result.clip_fraction == 0
