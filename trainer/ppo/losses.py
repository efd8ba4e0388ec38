"""The two clipped losses of PPO (Schulman et al. 2017), each with what one wants to know about it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.ppo.masked import masked_mean


@dataclass(frozen=True)
class PolicyLoss:
    """Scalars, but for `ratio` [batch, time]. Only `loss` carries a gradient."""

    loss: Tensor
    ratio: Tensor
    """New over old probability of each token; means nothing outside the mask."""
    mean_ratio: Tensor
    clip_fraction: Tensor
    """Share of tokens whose clipped loss was the larger one."""
    approximate_kl: Tensor
    """Half the mean squared log-ratio, nats per token."""
    policy_kl: Tensor
    """Mean old minus new log-probability, nats per token."""


@dataclass(frozen=True)
class ValueLoss:
    """Scalars. Only `loss` carries a gradient."""

    loss: Tensor
    """Half the mean of the larger squared error; not yet weighted by vf_coef."""
    clip_fraction: Tensor
    error: Tensor
    """Mean squared error without the clip."""


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    cliprange: float,
    weights: Tensor | None = None,
) -> PolicyLoss:
    """The clipped surrogate objective (Schulman et al. 2017, eq. 7), negated, as a mean over the mask's tokens.

    logprobs (with gradient), old_logprobs, advantages, mask: [batch, time]. weights: [batch, time], what each token's
    loss is multiplied by before the mean; None = 1.
    """
    log_ratio = (logprobs - old_logprobs) * mask  # a ratio that overflows in a hole must not reach the sums
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - cliprange, 1.0 + cliprange)
    losses = torch.max(unclipped, clipped)
    loss = masked_mean(losses if weights is None else weights * losses, mask)
    with torch.no_grad():
        return PolicyLoss(
            loss=loss,
            ratio=ratio.detach(),
            mean_ratio=masked_mean(ratio, mask),
            clip_fraction=masked_mean((clipped > unclipped).to(mask.dtype), mask),
            approximate_kl=0.5 * masked_mean(log_ratio.square(), mask),
            policy_kl=masked_mean(-log_ratio, mask),
        )


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, cliprange: float) -> ValueLoss:
    """Half the mean squared error of the values, or of the values kept within `cliprange` of the old: the larger.

    values (with gradient), old_values, returns, mask: [batch, time]. From OpenAI's baselines (PPO2), not the paper.
    """
    near = torch.clamp(values, old_values - cliprange, old_values + cliprange)
    unclipped = (values - returns).square()
    clipped = (near - returns).square()
    loss = 0.5 * masked_mean(torch.max(unclipped, clipped), mask)
    with torch.no_grad():
        return ValueLoss(
            loss=loss,
            clip_fraction=masked_mean((clipped > unclipped).to(mask.dtype), mask),
            error=masked_mean(unclipped, mask),
        )
