"""Mean and variance of all scores seen so far, and scores scaled by them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RunningMoments:
    """Count, mean and sum of squared deviations of a stream, in double precision."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def updated(self, values: Tensor) -> RunningMoments:
        """The moments of the stream with `values` (any shape, finite) behind it (Chan et al. 1979)."""
        if values.numel() == 0:
            return self
        batch = values.detach().double()
        batch_mean = batch.mean().item()
        batch_squares = (batch - batch_mean).square().sum().item()
        count = self.count + batch.numel()
        delta = batch_mean - self.mean
        return RunningMoments(
            count=count,
            mean=self.mean + delta * batch.numel() / count,
            squares=self.squares + batch_squares + delta**2 * self.count * batch.numel() / count,
        )

    @property
    def std(self) -> float:
        """The standard deviation (divided by count − 1); 1 while it is undefined or 0, so that dividing by it is safe.

        TRL divides by zero after a single score, and blows equal scores up by 8·10⁶.
        """
        if self.count < 2 or self.squares == 0.0:
            return 1.0
        return math.sqrt(self.squares / (self.count - 1))


def scale_scores(scores: Tensor, moments: RunningMoments, *, subtract_mean: bool) -> Tensor:
    """scores [batch] over the running standard deviation, after subtracting the running mean if asked."""
    divisor = moments.std + torch.finfo(scores.dtype).eps
    return (scores - moments.mean) / divisor if subtract_mean else scores / divisor


def clip_scores(scores: Tensor, limit: float) -> Tensor:
    """scores [batch] kept within ± limit."""
    return scores.clamp(-limit, limit)
