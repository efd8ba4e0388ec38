"""Correcting for tokens that an older policy sampled."""

from __future__ import annotations

import torch
from torch import Tensor

IMPORTANCE_CAP = 2.0


def truncated_importance_weights(old_logprobs: Tensor, rollout_logprobs: Tensor, *, cap: float) -> Tensor:
    """min(exp(old − rollout), cap) of each token, without gradient: truncated importance sampling (Ionides 2008).

    old_logprobs: under the policy that the step starts from; rollout_logprobs: under whichever weights sampled the
    token; both and the result [batch, time]. What lies outside the mask means nothing.
    """
    with torch.no_grad():
        return (old_logprobs - rollout_logprobs).exp().clamp(max=cap)
