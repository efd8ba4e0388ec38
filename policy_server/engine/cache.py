"""What transformers' DynamicCache lacks for batches that rows leave and join: select, merge, trim.

All rows of a cache end at the same column; shorter ones are padded on the left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DummyLayer, DynamicLayer, DynamicSlidingWindowLayer


def is_plain(cache: Cache) -> bool:
    """Whether every layer is keys and values by position, which is what merge and trim understand.

    Recurrent and indexed layers hold more: rows of such models decode in the batch they were prefilled in.
    """
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer) for layer in cache.layers)


def select(cache: Cache, rows: Sequence[int], device: torch.device) -> None:
    """Keep `rows`, in that order; a row named twice is copied."""
    index = torch.tensor(rows, dtype=torch.long, device=device)
    # The only selection that every kind of layer has, recurrent ones included.
    cache.reorder_cache(cast(torch.LongTensor, index))


def merge(cache: Cache, other: Cache, *, columns: int) -> None:
    """Append the rows of `other`, both padded to `columns` = the longer of the two; plain caches only."""
    for (layer, keys, values), (_, more_keys, more_values) in zip(_filled(cache), _filled(other), strict=True):
        width = columns
        if isinstance(layer, DynamicSlidingWindowLayer):
            width = min(columns, layer.sliding_window - 1)
            layer.cumulative_length = columns
        layer.keys = torch.cat([pad_left(each, width, dim=-2) for each in (keys, more_keys)])
        layer.values = torch.cat([pad_left(each, width, dim=-2) for each in (values, more_values)])


def trim(cache: Cache, *, columns: int, remaining: int) -> None:
    """Drop the first `columns` columns, padding in every row, so that `remaining` are left; plain caches only."""
    for layer, keys, values in _filled(cache):
        missing = columns
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = remaining
            missing = max(keys.shape[-2] - remaining, 0)
        layer.keys = keys[:, :, missing:]
        layer.values = values[:, :, missing:]


def pad_left(states: Tensor, width: int, *, dim: int) -> Tensor:
    """Put zeros before dimension `dim` (counted from the end) until it is `width` long."""
    missing = width - states.shape[dim]
    return torch.nn.functional.pad(states, (0, 0) * (-dim - 1) + (missing, 0))


def _filled(cache: Cache) -> list[tuple[DynamicLayer, Tensor, Tensor]]:
    """The layers with keys and values of their own: some models share one layer's among several."""
    return [
        (layer, layer.keys, layer.values)
        for layer in cache.layers
        if isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None
    ]
