"""How far raters agree."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping


def krippendorff_alpha(coincidences: Mapping[tuple[float, float], float]) -> float | None:
    """Krippendorff's alpha for interval data: 1 = the raters agree, 0 = as by chance, below = worse than that.

    Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011), with the coincidence matrix: 1 - D_o / D_e, the
    squared differences within samples over those within all ratings. coincidences: for two values, how many ordered
    pairs of a sample's ratings have them, each pair counted as 1 / (ratings of its sample - 1). None where alpha is
    undefined: nothing pairs, or all ratings are equal.
    """
    ratings: dict[float, float] = defaultdict(float)
    for (value, _), count in coincidences.items():
        ratings[value] += count
    expected = sum(
        count * other_count * (value - other) ** 2
        for value, count in ratings.items()
        for other, other_count in ratings.items()
    )
    if expected == 0:
        return None
    observed = sum(count * (value - other) ** 2 for (value, other), count in coincidences.items())
    return 1 - (sum(ratings.values()) - 1) * observed / expected
