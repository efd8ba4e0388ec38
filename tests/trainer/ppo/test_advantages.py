from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.trainer.ppo.strategies import masked
from trainer.ppo.advantages import generalized_advantages


def advantages_by_definition(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:
    """A_t = Σ_k (γλ)^k δ_{t+k}, each δ from scratch: O(T²)."""
    rows, time = rewards.shape
    result = torch.zeros_like(rewards)
    for row in range(rows):
        for t in range(time):
            for k in range(time - t):
                following = values[row, t + k + 1] if t + k + 1 < time else 0.0
                delta = rewards[row, t + k] + gamma * following - values[row, t + k]
                result[row, t] += (gamma * lam) ** k * delta
    return result


@given(masked(tensors=2), st.floats(0, 1), st.floats(0, 1))
def test_the_scan_equals_the_definition(tensors: tuple[Tensor, ...], gamma: float, lam: float) -> None:
    rewards, values, mask = tensors
    rewards, values = rewards * mask, values * mask
    scanned = generalized_advantages(rewards, values, gamma=gamma, lam=lam)
    torch.testing.assert_close(scanned, advantages_by_definition(rewards, values, gamma, lam))


@given(masked(tensors=2), st.floats(0, 1))
def test_with_lambda_1_the_returns_are_the_discounted_rewards(tensors: tuple[Tensor, ...], gamma: float) -> None:
    rewards, values, _ = tensors
    returns = generalized_advantages(rewards, values, gamma=gamma, lam=1.0) + values
    for t in range(rewards.shape[1]):
        discounts = gamma ** torch.arange(rewards.shape[1] - t, dtype=torch.float64)
        torch.testing.assert_close(returns[:, t], (rewards[:, t:] * discounts).sum(1))


@given(masked(tensors=2), st.integers(1, 4))
def test_padding_on_the_right_changes_nothing(tensors: tuple[Tensor, ...], columns: int) -> None:
    rewards, values, _ = tensors
    pad = (0, columns)
    padded = generalized_advantages(
        torch.nn.functional.pad(rewards, pad), torch.nn.functional.pad(values, pad), gamma=0.9, lam=0.8
    )
    alone = generalized_advantages(rewards, values, gamma=0.9, lam=0.8)
    torch.testing.assert_close(padded[:, : rewards.shape[1]], alone)
