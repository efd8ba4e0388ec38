"""GPT-2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2LMHeadModel
from transformers.cache_utils import Cache

from policy_server.engine.activations import gelu
from policy_server.engine.lean.parts import StepAttention, filled, product


class LeanGpt2:
    """A LeanForward. Layer norm before attention and before the products around GELU; learned positions."""

    def __init__(self, module: GPT2LMHeadModel) -> None:
        self._tokens = module.transformer.wte.weight
        self._positions = module.transformer.wpe.weight
        self._blocks = [_Block(block) for block in module.transformer.h]
        self._norm = module.transformer.ln_f
        self._head = product(module.lm_head)
        self._heads = module.config.n_head

    def logits(self, token_ids: Tensor, positions: Tensor, mask: Tensor, cache: Cache) -> Tensor:
        """See LeanForward."""
        attention = StepAttention(mask, cache, heads=self._heads, key_heads=self._heads)
        hidden = F.embedding(filled(token_ids), self._tokens) + F.embedding(filled(positions), self._positions)
        for layer, block in enumerate(self._blocks):
            hidden = block.forward(hidden, layer, attention)
        return self._head(_normed(hidden, self._norm))[: len(token_ids)]


class _Block:
    def __init__(self, block: Any) -> None:
        attn, mlp = block.attn, block.mlp
        self._norms = (block.ln_1, block.ln_2)
        self._heads, self._width, self._scaling = attn.num_heads, attn.head_dim, attn.scaling
        self._query_key_value, self._out = product(attn.c_attn), product(attn.c_proj)
        self._up, self._down = product(mlp.c_fc), product(mlp.c_proj)

    def forward(self, hidden: Tensor, layer: int, attention: StepAttention) -> Tensor:
        mixed = self._query_key_value(_normed(hidden, self._norms[0]))
        query, key, value = mixed.view(len(hidden), 3, self._heads, self._width).unbind(1)
        hidden = hidden + self._out(attention.attend(layer, query, key, value, self._scaling))
        return hidden + self._down(gelu(self._up(_normed(hidden, self._norms[1]))))


def _normed(hidden: Tensor, norm: nn.LayerNorm) -> Tensor:
    return torch.layer_norm(hidden, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
