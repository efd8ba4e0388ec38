"""What the epochs of a PPO step train on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from trainer.ppo.advantages import generalized_advantages
from trainer.ppo.masked import whiten


@dataclass(frozen=True)
class Experience:
    """What the epochs train on; every tensor [batch, time] fp32 on one device, meaningless outside the mask."""

    mask: Tensor
    old_logprobs: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor
    importance_weights: Tensor | None = None
    """What each token's policy loss is multiplied by; None = 1."""

    def rows(self, chosen: list[int]) -> Experience:
        """The samples `chosen`, in that order."""
        return self._map(lambda tensor: tensor[chosen])

    def cut(self, time: int) -> Experience:
        """The first `time` columns."""
        return self._map(lambda tensor: tensor[:, :time])

    def _map(self, change: Callable[[Tensor], Tensor]) -> Experience:
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: change(tensor) for name, tensor in tensors.items() if tensor is not None})


@torch.no_grad()
def gather_experience(
    rewards: Tensor,
    values: Tensor,
    old_logprobs: Tensor,
    mask: Tensor,
    *,
    gamma: float,
    lam: float,
    whiten_rewards: bool,
) -> Experience:
    """Advantages, whitened once over the whole batch, and returns (advantages before whitening + values).

    rewards, values, old_logprobs, mask: [batch, time]. Holes of the mask stay on the time axis with reward and value 0.
    """
    values = values * mask
    if whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False)
    advantages = generalized_advantages(rewards, values, gamma=gamma, lam=lam)
    return Experience(
        mask=mask,
        old_logprobs=old_logprobs,
        old_values=values,
        advantages=whiten(advantages, mask),
        returns=(advantages + values) * mask,
    )
