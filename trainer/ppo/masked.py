"""Means, variances and whitening over the tokens of a mask.

Every reduction of PPO goes through here: each is sums and a count, so that sums over all processes can take
their place.
"""

from __future__ import annotations

import torch
from torch import Tensor


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of `values` where `mask` is 1, a scalar; NaN if it is 1 nowhere. Both have one shape; values finite."""
    return (values * mask).sum() / mask.sum()


def masked_variance(values: Tensor, mask: Tensor) -> Tensor:
    """The variance of `values` where `mask` is 1, divided by count − 1 (Bessel), a scalar; NaN for fewer than two."""
    count = mask.sum()
    squares = ((values - masked_mean(values, mask)).square() * mask).sum()
    return torch.where(count > 1, squares / (count - 1), torch.nan)


def whiten(values: Tensor, mask: Tensor, *, shift_mean: bool = True, epsilon: float = 1e-8) -> Tensor:
    """`values` scaled to unit variance over the mask, centred on 0, or on their old mean without `shift_mean`.

    values, mask: one shape; the result is 0 outside the mask. A single token has no variance: it is only centred (in
    TRL it becomes NaN, and the parameters after it).
    """
    mean, variance = masked_mean(values, mask), masked_variance(values, mask)
    scale = torch.rsqrt(torch.where(variance.isnan(), 1.0, variance) + epsilon)
    whitened = (values - mean) * scale
    if not shift_mean:
        whitened = whitened + mean
    return whitened * mask
