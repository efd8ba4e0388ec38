"""Attention of one query per row, by batched matrix products.

On a CPU torch's own attention takes three times as long for it once there is a mask; for more queries, and everything
else that it can do, it stays.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_NAME = "rlhf_decode"


def install(module: PreTrainedModel) -> bool:
    """Let a model on a CPU, in full precision, that uses torch's attention use this one; whether it does now."""
    # In half precision torch's own keeps its sums in full precision, and this one would not.
    if (module.device.type, module.dtype, module.config._attn_implementation) != ("cpu", torch.float32, "sdpa"):
        return False
    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    module.set_attn_implementation(_NAME)
    return bool(module.config._attn_implementation == _NAME)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """As transformers' attention functions: query [rows, heads, queries, width], key and value [rows, key heads, time,
    width], a bool mask [rows, 1, queries, time] or None; returns [rows, queries, heads, width].
    """
    ours = attention_mask is None or (attention_mask.dtype == torch.bool and attention_mask.shape[1] == 1)
    if query.shape[2] != 1 or not ours or any(others.get(name) is not None for name in _BEYOND_US):
        attended: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
        return attended
    rows, heads, _, width = query.shape
    # Queries that share a key head are one matrix.
    query = query.reshape(rows, key.shape[1], heads // key.shape[1], width) * (scaling or width**-0.5)
    weights = torch.matmul(query, key.transpose(2, 3))
    if attention_mask is not None:
        # A padded query sees nothing: from -inf alone it would get no number, which spreads from there.
        weights.masked_fill_(~attention_mask, torch.finfo(weights.dtype).min)
    output = torch.matmul(torch.softmax(weights, dim=-1), value)
    return output.reshape(rows, 1, heads, value.shape[-1]), None


_BEYOND_US = ("position_bias", "softcap", "s_aux")
