"""How well predictions agree with what people said. Pure functions on arrays of one dimension."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.floating[Any]]


def pearson(a: Numbers, b: Numbers) -> float:
    """Pearson's correlation, −1 to 1; NaN where either is constant, for which it is not defined."""
    a, b = a - a.mean(), b - b.mean()
    norms = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / norms if norms > 0 else float("nan")


def spearman(a: Numbers, b: Numbers) -> float:
    """Spearman's correlation: Pearson's of the ranks, equal values sharing the mean of theirs."""
    return pearson(_ranks(a), _ranks(b))


def rmse(predicted: Numbers, actual: Numbers) -> float:
    """Root of the mean squared difference."""
    return float(np.sqrt(np.mean((predicted - actual) ** 2)))


def _ranks(values: Numbers) -> Numbers:
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: Numbers = (last - (counts - 1) / 2)[which]
    return ranks
