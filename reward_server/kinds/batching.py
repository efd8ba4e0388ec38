"""Which texts go through a model together, and how they are made one length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One text as token ids, never empty. segments: for each token whose text it is of (0, 1), or empty.

    truncated: the text was longer.
    """

    ids: Sequence[int]
    segments: Sequence[int] = ()
    truncated: bool = False


def micro_batches(lengths: Sequence[int], budget: int, *, padding: bool = True) -> Iterator[list[int]]:
    """Indices of texts that go together, longest first; rows × longest of each batch is at most `budget`.

    A text longer than the budget goes alone. Texts of like length meet, so that little is padding; without `padding`
    all of a batch have the same length.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        longest = lengths[batch[0]] if batch else 0
        if batch and ((len(batch) + 1) * longest > budget or not (padding or lengths[index] == longest)):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@dataclass(frozen=True)
class Padded:
    """Rows filled up on the right to the longest; mask is 1 on what is text. segments: empty if no row has any."""

    ids: list[list[int]]
    mask: list[list[int]]
    segments: list[list[int]]


def pad(rows: Sequence[Row], filler: int) -> Padded:
    """Fill with the token `filler`, and segment 0."""
    width = max(len(row.ids) for row in rows)
    return Padded(
        ids=[[*row.ids, *[filler] * (width - len(row.ids))] for row in rows],
        mask=[[1] * len(row.ids) + [0] * (width - len(row.ids)) for row in rows],
        segments=[[*row.segments, *[0] * (width - len(row.segments))] for row in rows]
        if any(row.segments for row in rows)
        else [],
    )
