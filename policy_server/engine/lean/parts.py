"""What the written-out forwards have in common: attention of one query per row, and products on all threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache

from policy_server.engine.cache import GrowingLayer
from policy_server.engine.threads import waking_for


def filled(per_row: Tensor) -> Tensor:
    """One value per row [rows], with zeros after them up to a number of rows that most products take as it is.

    Those of products.py take multiples of 4, of 8 beyond 32, and would else fill up the input of each layer.
    """
    rows = len(per_row)
    missing = -rows % (4 if rows <= 32 else 8)
    return F.pad(per_row, (0, missing)) if missing else per_row


def product(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """The forward that a linear layer has now, of inputs [filled rows, in]."""
    forward: Callable[[Tensor], Tensor] = layer.forward
    weights = sum(parameter.numel() for parameter in layer.parameters())

    def multiplied(inputs: Tensor) -> Tensor:
        with waking_for(len(inputs) * weights):
            return forward(inputs)

    return multiplied


class LeanForward(Protocol):
    """One decode step, which `ServedModel` runs within `sparing_threads`."""

    def logits(self, token_ids: Tensor, positions: Tensor, mask: Tensor, cache: Cache) -> Tensor:
        """Append a token to each row of the cache, and return the logits of what follows: [rows, vocab].

        token_ids, positions: int64 [rows]. mask: int64 [rows, cached + 1], 1 = token, 0 = padding.
        """
        ...


class StepAttention:
    """Attention of one query per row to a cache, in all layers of one step.

    mask: as `LeanForward.logits` has it. heads, key_heads: of every layer. Rows after those of the mask are fillers.
    """

    def __init__(self, mask: Tensor, cache: Cache, *, heads: int, key_heads: int) -> None:
        self._cache = cache
        self._rows, self._heads, self._key_heads = len(mask), heads, key_heads
        self._attended: Tensor | None = None
        self._bias = torch.zeros(1, 1, 1, device=mask.device)
        if not bool(mask.all()):
            bias = torch.zeros(mask.shape, device=mask.device).masked_fill_(mask == 0, -torch.inf)
            self._bias = bias.repeat_interleave(key_heads, dim=0).unsqueeze(1)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Append key and value [filled rows, key heads, width] to the layer's, and return what query [filled rows,
        heads, width] makes of all values: [filled rows, heads × width], zeros for fillers, until the next call.
        """
        rows = self._rows
        keys, values = cast(GrowingLayer, self._cache.layers[layer]).append(key[:rows], value[:rows])
        # Queries that share a key head are one matrix.
        group = (rows * self._key_heads, self._heads // self._key_heads, -1)
        queries = query[:rows].reshape(group)
        if self._attended is None:
            self._attended = values.new_zeros(len(query), self._heads * values.shape[-1])
        with waking_for(queries.numel() * keys.shape[-2]):
            if group[1] == 1:  # the same memory either way round, and the other way takes a sixth longer
                weights = torch.baddbmm(self._bias.mT, keys, queries.mT, alpha=scaling).mT
            else:
                weights = torch.baddbmm(self._bias, queries, keys.mT, alpha=scaling)
            torch.bmm(torch.softmax(weights, dim=-1), values, out=self._attended[:rows].view(group))
        return self._attended
