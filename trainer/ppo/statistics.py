"""What a step reports, under TRL 0.11's names: over response tokens that are trained on, never over prompt or padding.

A number that is undefined (the variance of one token) is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from trainer.ppo.losses import PolicyLoss, ValueLoss
from trainer.ppo.masked import masked_mean, masked_variance

Statistics = dict[str, float | Tensor | list[Tensor]]
"""Scalars, 1-D tensors (one number per sample or token) and lists of one 1-D tensor per sample; tensors on the CPU."""


def minibatch_statistics(
    *,
    policy: PolicyLoss,
    value: ValueLoss,
    vf_coef: float,
    entropy: Tensor,
    values: Tensor,
    old_values: Tensor,
    advantages: Tensor,
    returns: Tensor,
    mask: Tensor,
) -> dict[str, Tensor]:
    """Scalars of one mini-batch, without gradient, on the tensors' device. All tensors are [batch, time]."""
    with torch.no_grad():
        return {
            "ppo/loss/policy": policy.loss.detach(),
            "ppo/loss/value": value.loss.detach(),
            "ppo/loss/total": policy.loss.detach() + vf_coef * value.loss.detach(),
            "ppo/policy/entropy": masked_mean(entropy, mask),
            "ppo/policy/approxkl": policy.approximate_kl,
            "ppo/policy/policykl": policy.policy_kl,
            "ppo/policy/clipfrac": policy.clip_fraction,
            "ppo/policy/advantages_mean": masked_mean(advantages, mask),
            "ppo/returns/mean": masked_mean(returns, mask),
            "ppo/returns/var": masked_variance(returns, mask),
            "ppo/val/vpred": masked_mean(values.detach(), mask),
            "ppo/val/error": value.error,
            "ppo/val/clipfrac": value.clip_fraction,
            "ppo/val/mean": masked_mean(old_values, mask),
            "ppo/val/var": masked_variance(old_values, mask),
        }


def combined_over_minibatches(minibatches: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over all mini-batches of a step, each counting the same, those where a number is undefined left out."""
    combined = {
        name: mean([numbers[name] for numbers in minibatches if not math.isnan(numbers[name])])
        for name in minibatches[0]
    }
    error, variance = combined["ppo/val/error"], combined["ppo/returns/var"]
    combined["ppo/val/var_explained"] = 1.0 - error / variance if variance else math.nan
    return combined


def objective_statistics(
    *, kl: Tensor, kl_rewards: Tensor, logprobs: Tensor, mask: Tensor, scores: Tensor, kl_coef: float
) -> Statistics:
    """How far the policy is from the reference and what it earned, before any update.

    kl, kl_rewards (the part of the rewards that the KL makes), logprobs, mask: [batch, time]; scores: [batch].
    """
    kl_per_sample = (kl * mask).sum(1).cpu()
    return {
        "objective/kl": kl_per_sample.mean().item(),
        "objective/kl_dist": kl_per_sample,
        "objective/kl_coef": kl_coef,
        "objective/entropy": (-logprobs * mask).sum(1).mean().item(),
        "ppo/mean_non_score_reward": masked_mean(kl_rewards, mask).item(),
        "ppo/mean_scores": scores.mean().item(),
        "ppo/std_scores": std(scores),
    }


def length_statistics(queries: Sequence[Tensor], responses: Sequence[Tensor]) -> Statistics:
    """Lengths of prompts and responses, in tokens."""
    statistics: Statistics = {}
    for name, rows in (("queries", queries), ("responses", responses)):
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.float32)
        statistics[f"tokens/{name}_len_mean"] = lengths.mean().item()
        statistics[f"tokens/{name}_len_std"] = std(lengths)
        statistics[f"tokens/{name}_dist"] = lengths
    return statistics


def gap_statistics(logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor) -> Statistics:
    """How far the trainer's log-probabilities lie from those of the rollout, absolute, in nats; all [batch, time]."""
    gap = (logprobs - rollout_logprobs).abs() * mask
    return {"rollout/logprob_gap_mean": masked_mean(gap, mask).item(), "rollout/logprob_gap_max": gap.max().item()}


def staleness_statistics(staleness: Tensor) -> Statistics:
    """Of the samples' staleness in versions, [batch]."""
    return {
        "rollout/staleness_mean": staleness.float().mean().item(),
        "rollout/staleness_max": float(staleness.max()),
    }


def importance_statistics(weights: Tensor, mask: Tensor, *, cap: float) -> Statistics:
    """Of truncated importance weights, [batch, time]: their mean, and the share of tokens at the cap."""
    return {
        "ppo/policy/importance_weight_mean": masked_mean(weights, mask).item(),
        "ppo/policy/importance_clipped": masked_mean((weights >= cap).to(mask.dtype), mask).item(),
    }


def mean(numbers: Sequence[float]) -> float:
    """The mean; NaN of nothing."""
    return math.fsum(numbers) / len(numbers) if numbers else math.nan


def std(values: Tensor) -> float:
    """The standard deviation (divided by count − 1) of a 1-D tensor; NaN for fewer than two values."""
    return values.std().item() if values.numel() > 1 else math.nan
