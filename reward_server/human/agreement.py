"""How far raters agree."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def krippendorff_alpha(units: Iterable[Sequence[float]]) -> float | None:
    """Krippendorff's alpha for interval data: 1 = the raters agree, 0 = as by chance, below = worse than that.

    Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011), section E: 1 - D_o / D_e, the squared differences
    within units over those within all ratings. units: the ratings of a sample each; one alone pairs with nothing and
    counts nowhere. None where alpha is undefined: nothing pairs, or all ratings are equal.
    """
    pairable = [unit for unit in units if len(unit) > 1]
    pooled = [rating for unit in pairable for rating in unit]
    if len(pooled) < 2:
        return None
    expected = _squared_differences(pooled) / (len(pooled) - 1)
    if expected == 0:
        return None
    observed = sum(_squared_differences(unit) / (len(unit) - 1) for unit in pairable)
    return 1 - observed / expected


def _squared_differences(ratings: Sequence[float]) -> float:
    """The sum over all ordered pairs, which is 2 n times that of the squared distances from the mean."""
    mean = sum(ratings) / len(ratings)
    return 2 * len(ratings) * sum((rating - mean) ** 2 for rating in ratings)
