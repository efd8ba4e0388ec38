"""From what a reward of a composite says to what counts: running moments, an affine map, clipping."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class RunningMoments:
    """Mean and variance of all numbers seen so far (Welford 1962; Chan et al. 1979 for batches)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    """Sum of squared differences from the mean."""

    def update(self, values: Sequence[float]) -> None:
        """See a batch of finite numbers; it may be empty."""
        if not values:
            return
        count = self.count + len(values)
        own_mean = math.fsum(values) / len(values)
        own_squares = math.fsum((value - own_mean) ** 2 for value in values)
        difference = own_mean - self.mean
        self.squares += own_squares + difference**2 * self.count * len(values) / count
        self.mean += difference * len(values) / count
        self.count = count

    def normalised(self, value: float) -> float:
        """`value` less the mean, over the standard deviation (Bessel); over 1 while that is undefined or 0."""
        variance = self.squares / (self.count - 1) if self.count > 1 else 0.0
        return (value - self.mean) / (math.sqrt(variance) if variance > 0 else 1.0)


def affine(value: float, *, scale: float, shift: float, clip: tuple[float, float] | None) -> float:
    """`value`·scale + shift, within `clip`."""
    moved = value * scale + shift
    return moved if clip is None else min(max(moved, clip[0]), clip[1])
