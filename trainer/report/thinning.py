"""Fewer points than there are steps, without hiding anything that stands out."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.report.reading import Points


def envelope(points: Points, *, most: int) -> Points:
    """At most about `most` of the points as they are: of each stretch the lowest and the highest, and both ends.

    A stretch without a number keeps one undefined point, so that a gap stays one.
    """
    if len(points) <= most:
        return points
    kept = {0, len(points) - 1}
    for start, end in stretches(len(points), most // 2):
        defined = [(value, index) for index in range(start, end) if (value := points[index][1]) is not None]
        kept |= {min(defined)[1], max(defined)[1]} if defined else {start}
    return [points[index] for index in sorted(kept)]


def stretches(count: int, most: int) -> list[tuple[int, int]]:
    """`count` things cut into at most `most` stretches of nearly equal length, as (first, one past the last)."""
    most = min(count, max(1, most))
    return [(count * part // most, count * (part + 1) // most) for part in range(most)]


def spread(steps: Sequence[int], *, most: int) -> list[int]:
    """At most `most` steps (two at least), evenly by place, both ends among them."""
    if len(steps) <= most:
        return list(steps)
    return [steps[round((len(steps) - 1) * part / (most - 1))] for part in range(most)]
