"""A layer that grows in place holds what one that copies holds, whatever rows leave and join."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from policy_server.engine.cache import GrowingLayer, pad_left

HEADS, KEY_WIDTH, VALUE_WIDTH = 2, 3, 5


class Pair:
    """The two layers, given the same states."""

    def __init__(self, rows: int, columns: int, seed: int) -> None:
        self._random = torch.Generator().manual_seed(seed)
        self.growing, self.copying = GrowingLayer(), DynamicLayer()  # type: ignore[no-untyped-call]
        self.rows = rows
        self.append(columns)

    @property
    def columns(self) -> int:
        return int(self.copying.get_seq_length())

    def append(self, columns: int) -> None:
        states = [
            torch.randn(self.rows, HEADS, columns, width, generator=self._random) for width in (KEY_WIDTH, VALUE_WIDTH)
        ]
        ours, theirs = self.growing.update(*states), self.copying.update(*states)
        assert all(map(torch.equal, ours, theirs))

    def keep(self, order: list[int]) -> None:
        index = torch.tensor(order)
        self.growing.reorder_cache(index)
        self.copying.reorder_cache(index)  # type: ignore[arg-type]
        self.rows = len(order)

    def trim(self, columns: int) -> None:
        self.growing.trim(columns)
        self.copying.keys, self.copying.values = (states[:, :, columns:] for states in contents(self.copying))

    def absorb(self, other: Pair) -> None:
        columns = max(self.columns, other.columns)
        self.growing.absorb(other.growing, columns=columns)
        self.copying.keys, self.copying.values = (
            torch.cat([pad_left(ours, columns, dim=-2), pad_left(theirs, columns, dim=-2)])
            for ours, theirs in zip(contents(self.copying), contents(other.copying), strict=True)
        )
        self.rows += other.rows

    def check(self) -> None:
        assert self.growing.get_seq_length() == self.columns
        assert all(map(torch.equal, contents(self.growing), contents(self.copying)))


def contents(layer: DynamicLayer) -> tuple[Tensor, Tensor]:
    assert layer.keys is not None
    assert layer.values is not None
    return layer.keys, layer.values


@given(st.data())
def test_it_holds_what_a_layer_that_copies_holds(data: st.DataObject) -> None:
    def whole(least: int, most: int) -> int:
        return data.draw(st.integers(least, most))

    pair = Pair(whole(1, 4), whole(1, 20), seed=0)
    for step in range(1, whole(2, 12)):
        match data.draw(st.sampled_from(["append", "long", "leave", "copy", "trim", "absorb"])):
            case "append":
                pair.append(1)
            case "long":
                pair.append(whole(1, 90))
            case "leave":
                kept = whole(1, pair.rows)
                pair.keep(data.draw(st.permutations(range(pair.rows)))[:kept])
            case "copy":
                pair.keep(data.draw(st.lists(st.integers(0, pair.rows - 1), min_size=1, max_size=5)))
            case "trim":
                pair.trim(whole(0, pair.columns - 1))
            case "absorb":
                pair.absorb(Pair(whole(1, 3), whole(1, 60), seed=step))
        pair.check()
