"""Llama, and what is built like it: Mistral, Qwen 2, Qwen 3."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache

from policy_server.engine.lean.parts import StepAttention, filled, product


class LeanLlama:
    """A LeanForward. RMS norm before attention and before the gated products; rotated positions, shared key heads."""

    def __init__(self, module: Any) -> None:
        config, model = module.config, module.model
        self._tokens = model.embed_tokens.weight
        self._rotations = model.rotary_emb
        self._heads, self._key_heads = config.num_attention_heads, config.num_key_value_heads
        self._blocks = [_Block(layer, self._heads, self._key_heads) for layer in model.layers]
        self._norm = model.norm
        self._head = product(module.lm_head)

    def logits(self, token_ids: Tensor, positions: Tensor, mask: Tensor, cache: Cache) -> Tensor:
        """See LeanForward."""
        attention = StepAttention(mask, cache, heads=self._heads, key_heads=self._key_heads)
        hidden = F.embedding(filled(token_ids), self._tokens)
        cosines, sines = self._rotations(hidden, filled(positions).unsqueeze(-1))  # [filled rows, 1, width]
        for layer, block in enumerate(self._blocks):
            hidden = block.forward(hidden, layer, attention, cosines, sines)
        return self._head(_normed(hidden, self._norm))[: len(token_ids)]


class _Block:
    def __init__(self, layer: Any, heads: int, key_heads: int) -> None:
        attn, mlp = layer.self_attn, layer.mlp
        self._norms = (layer.input_layernorm, layer.post_attention_layernorm)
        self._heads, self._key_heads, self._scaling = heads, key_heads, attn.scaling
        self._query, self._key, self._value = product(attn.q_proj), product(attn.k_proj), product(attn.v_proj)
        self._query_norm, self._key_norm = getattr(attn, "q_norm", None), getattr(attn, "k_norm", None)
        self._out = product(attn.o_proj)
        self._gate, self._up, self._down = product(mlp.gate_proj), product(mlp.up_proj), product(mlp.down_proj)

    def forward(self, hidden: Tensor, layer: int, attention: StepAttention, cosines: Tensor, sines: Tensor) -> Tensor:
        rows, normed = len(hidden), _normed(hidden, self._norms[0])
        query = self._query(normed).view(rows, self._heads, -1)
        key = self._key(normed).view(rows, self._key_heads, -1)
        value = self._value(normed).view(rows, self._key_heads, -1)
        if self._query_norm is not None and self._key_norm is not None:
            query, key = _normed(query, self._query_norm), _normed(key, self._key_norm)
        query, key = _rotated(query, cosines, sines), _rotated(key, cosines, sines)
        hidden = hidden + self._out(attention.attend(layer, query, key, value, self._scaling))
        normed = _normed(hidden, self._norms[1])
        return hidden + self._down(F.silu(self._gate(normed)).mul_(self._up(normed)))


def _normed(hidden: Tensor, norm: Any) -> Tensor:
    return F.rms_norm(hidden, hidden.shape[-1:], norm.weight, norm.variance_epsilon)


def _rotated(states: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary positions in the order of halves, as transformers has them; states [rows, heads, width]."""
    first, second = states.chunk(2, dim=-1)
    return torch.addcmul(states * cosines, torch.cat((-second, first), dim=-1), sines)
