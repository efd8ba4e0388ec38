from __future__ import annotations

import torch
from hypothesis import given
from torch import Tensor

from tests.trainer.ppo.strategies import masked
from trainer.ppo.rewards import token_rewards


def test_the_score_comes_with_the_last_trained_token() -> None:
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    rewards, penalty = token_rewards(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.zeros(4, 3), mask, kl_coef=0.2)
    assert rewards.tolist() == [[0, 0, 1], [2, 0, 0], [0, 3, 0], [0, 4, 0]]
    assert (penalty == 0).all()


@given(masked(tensors=2))
def test_rewards_are_penalty_and_score_and_extra_within_the_mask(tensors: tuple[Tensor, ...]) -> None:
    kl, extra, mask = tensors
    scores = kl.sum(1)
    rewards, penalty = token_rewards(scores, kl, mask, kl_coef=0.5, extra=extra)
    torch.testing.assert_close(penalty, -0.5 * kl * mask)
    torch.testing.assert_close(rewards.sum(1), scores + ((extra - 0.5 * kl) * mask).sum(1))
    assert (rewards[~mask.bool()] == 0).all()
