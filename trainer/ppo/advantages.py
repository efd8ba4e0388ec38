"""How much better than expected each token turned out."""

from __future__ import annotations

import torch
from torch import Tensor


def generalized_advantages(rewards: Tensor, values: Tensor, *, gamma: float, lam: float) -> Tensor:
    """Advantages by GAE (Schulman et al. 2016, eq. 16), scanned from the last token back.

    rewards, values: [batch, time], 0 where a row has no token; the result is [batch, time] and means nothing there.
    The value after the last column counts as 0: the episode ends with the completion, cut by length or not. Holes
    inside a completion keep their place on the time axis.
    """
    advantages = torch.empty_like(rewards)
    following_value = torch.zeros_like(rewards[:, 0])
    following_advantage = torch.zeros_like(rewards[:, 0])
    for t in range(rewards.shape[1] - 1, -1, -1):
        surprise = rewards[:, t] + gamma * following_value - values[:, t]
        following_advantage = surprise + gamma * lam * following_advantage
        advantages[:, t] = following_advantage
        following_value = values[:, t]
    return advantages
