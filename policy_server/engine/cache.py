"""What transformers' caches lack for batches that rows leave and join: select, merge, trim, with little copying.

All rows of a cache end at the same column; shorter ones are padded on the left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

# Columns that a layer has room for beyond those it needs: more means less copying, and more memory.
SPARE_COLUMNS = 64
_ROWS_PER_SPARE_ROW = 8


class GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values by position, in memory with room to grow.

    A step writes one column, and a row that leaves moves one row at most. `keys` and `values` are views of the used
    part: the first rows of the room, some of its columns.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rooms: tuple[Tensor, ...] = ()
        self._rows = self._start = self._end = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append columns, and return all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._rows = len(key_states)
        states = (key_states, value_states)
        columns = key_states.shape[-2]
        self._make_room(states, rows=self._rows, after=columns)
        for room, new in zip(self.rooms, states, strict=True):
            room[: self._rows, :, self._end : self._end + columns] = new
        self._end += columns
        return self._show()

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append one column [rows, heads, width], and return all keys and values: [rows × heads, time, width]."""
        assert self.keys is not None
        self._make_room((key.unsqueeze(-2), value.unsqueeze(-2)), rows=self._rows, after=1)
        for room, new in zip(self.rooms, (key, value), strict=True):
            room[: self._rows, :, self._end] = new
        self._end += 1
        keys, values = self._show()
        return keys.flatten(0, 1), values.flatten(0, 1)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep rows in that order. Rows of the end that fill the places of others move; any other order copies all."""
        if not self.is_initialized:
            return
        order = beam_idx.tolist()
        moves = [(place, row) for place, row in enumerate(order) if place != row]
        if all(row >= len(order) for _, row in moves):
            for room in self.rooms:
                for place, row in moves:
                    room[place, :, self._start : self._end] = room[row, :, self._start : self._end]
        else:
            self.rooms = tuple(room.index_select(0, beam_idx) for room in self.rooms)
        self._rows = len(order)
        self._show()

    def absorb(self, other: GrowingLayer, *, columns: int) -> None:
        """Append the rows of `other`, both padded to `columns` = the longer of the two."""
        rows, length = self._rows + other._rows, other._end - other._start
        self._make_room(other._used(), rows=rows, before=columns - (self._end - self._start))
        start = self._end - columns
        for room, states in zip(self.rooms, other._used(), strict=True):
            # What padding holds is multiplied by 0, so it must be a number.
            room[: self._rows, :, start : self._start] = 0
            room[self._rows : rows, :, start : self._end - length] = 0
            room[self._rows : rows, :, self._end - length : self._end] = states
        self._rows, self._start = rows, start
        self._show()

    def trim(self, columns: int) -> None:
        """Drop the first columns."""
        self._start += columns
        self._show()

    def _used(self) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def _show(self) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (room[: self._rows, :, self._start : self._end] for room in self.rooms)
        return self._used()

    def _make_room(self, like: Sequence[Tensor], *, rows: int, before: int = 0, after: int = 0) -> None:
        """Room for `rows` rows, and for more columns before and after those in use, which may move to make it."""
        has = [room.shape for room in self.rooms]
        if has and has[0][0] >= rows and self._start >= before and has[0][2] - self._end >= after:
            return
        used = self._end - self._start
        columns = before + used + after + SPARE_COLUMNS
        # Rows that left often have successors, but room for many that grows longer for a few would be without a bound.
        rows_kept = max([rows, *(min(shape[0], rows + rows // _ROWS_PER_SPARE_ROW) for shape in has)])
        rooms = []
        for position, states in enumerate(like):
            room = states.new_empty(rows_kept, states.shape[1], columns, states.shape[3])
            if has:
                room[: self._rows, :, before : before + used] = self._used()[position]
            rooms.append(room)
        self.rooms, self._start, self._end = tuple(rooms), before, before + used


def new_cache(config: PreTrainedConfig, *, growing: bool) -> Cache:
    """An empty cache of the kinds of layers that the model wants."""
    cache = DynamicCache(config=config)
    if growing:
        cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def held_bytes(cache: Cache) -> int:
    """Memory of a cache, room to grow included."""
    return sum(tensor.nbytes for layer in cache.layers for tensor in _tensors(layer))


def is_plain(cache: Cache) -> bool:
    """Whether every layer is keys and values by position, which is what merge and trim understand.

    Recurrent and indexed layers hold more: rows of such models decode in the batch they were prefilled in.
    """
    plain = (GrowingLayer, DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)
    return all(type(layer) in plain for layer in cache.layers)


def select(cache: Cache, rows: Sequence[int], device: torch.device) -> None:
    """Keep `rows`, in that order; a row named twice is copied."""
    index = torch.tensor(rows, dtype=torch.long, device=device)
    # The only selection that every kind of layer has, recurrent ones included.
    cache.reorder_cache(cast(torch.LongTensor, index))


def merge(cache: Cache, other: Cache, *, columns: int) -> None:
    """Append the rows of `other`, both padded to `columns` = the longer of the two; plain caches only."""
    for (layer, keys, values), (more, more_keys, more_values) in zip(_filled(cache), _filled(other), strict=True):
        if isinstance(layer, GrowingLayer) and isinstance(more, GrowingLayer):
            layer.absorb(more, columns=columns)
            continue
        width = columns
        if isinstance(layer, DynamicSlidingWindowLayer):
            width = min(columns, layer.sliding_window - 1)
            layer.cumulative_length = columns
        layer.keys = torch.cat([pad_left(each, width, dim=-2) for each in (keys, more_keys)])
        layer.values = torch.cat([pad_left(each, width, dim=-2) for each in (values, more_values)])


def trim(cache: Cache, *, columns: int, remaining: int) -> None:
    """Drop the first `columns` columns, padding in every row, so that `remaining` are left; plain caches only."""
    for layer, keys, values in _filled(cache):
        if isinstance(layer, GrowingLayer):
            layer.trim(columns)
            continue
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


def _tensors(layer: Any) -> list[Tensor]:
    if isinstance(layer, GrowingLayer):
        return list(layer.rooms)
    return [value for value in vars(layer).values() if isinstance(value, Tensor)]


def _filled(cache: Cache) -> list[tuple[DynamicLayer, Tensor, Tensor]]:
    """The layers with keys and values of their own: some models share one layer's among several."""
    return [
        (layer, layer.keys, layer.values)
        for layer in cache.layers
        if isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None
    ]
