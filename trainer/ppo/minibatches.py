"""How the samples of a step are cut into optimizer updates and those into mini-batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise


def split_into_updates(
    order: Sequence[int], *, mini_batch_size: int, gradient_accumulation_steps: int
) -> list[list[list[int]]]:
    """One epoch: optimizer updates, each a list of mini-batches, each a list of samples, in `order`.

    Full batches are cut as TRL cuts them. A batch that shrank (dropped samples) makes as many updates as it needs and
    no more, of nearly equal size, so that no update rests on a handful of left-over samples; no mini-batch exceeds
    `mini_batch_size`.
    """
    updates = math.ceil(len(order) / (mini_batch_size * gradient_accumulation_steps))
    return [_split_evenly(update, math.ceil(len(update) / mini_batch_size)) for update in _split_evenly(order, updates)]


def _split_evenly(items: Sequence[int], parts: int) -> list[list[int]]:
    bounds = [len(items) * part // parts for part in range(parts + 1)]
    return [list(items[start:end]) for start, end in pairwise(bounds)]
