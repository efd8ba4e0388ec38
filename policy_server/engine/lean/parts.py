"""What the written-out forwards have in common: attention of one query per row."""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from policy_server.engine.cache import GrowingLayer


class LeanForward(Protocol):
    """One decode step."""

    def logits(self, token_ids: Tensor, positions: Tensor, mask: Tensor, cache: Cache) -> Tensor:
        """Append a token to each row of the cache, and return the logits of what follows: [rows, vocab].

        token_ids, positions: int64 [rows]. mask: int64 [rows, cached + 1], 1 = token, 0 = padding.
        """
        ...


class StepAttention:
    """Attention of one query per row to a cache, in all layers of one step.

    mask: as `LeanForward.logits` has it. heads, key_heads: of every layer.
    """

    def __init__(self, mask: Tensor, cache: Cache, *, heads: int, key_heads: int) -> None:
        self._cache = cache
        self._rows, self._heads, self._key_heads = len(mask), heads, key_heads
        self._bias = torch.zeros(1, 1, 1, device=mask.device)
        if not bool(mask.all()):
            bias = torch.zeros(mask.shape, device=mask.device).masked_fill_(mask == 0, -torch.inf)
            self._bias = bias.repeat_interleave(key_heads, dim=0).unsqueeze(1)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Append key and value [rows, key heads, width] to the layer's, and return what query [rows, heads, width]
        makes of all values: [rows, heads × width].
        """
        keys, values = cast(GrowingLayer, self._cache.layers[layer]).append(key, value)
        # Queries that share a key head are one matrix.
        query = query.reshape(self._rows * self._key_heads, self._heads // self._key_heads, -1)
        weights = torch.baddbmm(self._bias, query, keys.transpose(1, 2), alpha=scaling)
        return torch.bmm(torch.softmax(weights, dim=-1), values).view(self._rows, -1)
