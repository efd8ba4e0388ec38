"""From one score per completion to one reward per token."""

from __future__ import annotations

import torch
from torch import Tensor


def token_rewards(
    scores: Tensor, kl: Tensor, mask: Tensor, *, kl_coef: float, extra: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rewards of every token, and the part of them that the KL penalty makes; both [batch, time].

    The penalty is −kl_coef · kl on every token, and the score comes with the last token of the mask (Ziegler et al.
    2019, eq. 2). scores: [batch]; kl, mask and `extra` (rewards for single tokens): [batch, time], where each row of
    the mask holds at least one 1. Both results are 0 outside the mask: what `extra` gives there is lost.
    """
    penalty = -kl_coef * kl * mask
    time = torch.arange(mask.shape[1], device=mask.device)
    last = (time * mask).argmax(dim=1, keepdim=True)
    rewards = penalty.scatter_add(1, last, scores[:, None].to(penalty.dtype))
    if extra is not None:
        rewards = rewards + extra * mask
    return rewards, penalty
