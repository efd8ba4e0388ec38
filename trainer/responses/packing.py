"""Attention within rows that follow each other without padding.

Everything but attention treats each token by itself, and so needs no padding; attention alone spreads the rows out,
and since padding comes last, being causal is mask enough. After the last attention, tokens that nobody asks about are
left out. Only the architectures below are known to mix tokens nowhere else, to take positions as an argument, and to
make logits of the last hidden states by their head alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer

from trainer.responses.rows import PackedRows

PACKABLE = frozenset({"gpt2", "llama", "mistral", "qwen2", "qwen3"})
"""transformers' names of architectures."""

_NAME = "packed_rows"


def enable_packing(model: PreTrainedModel) -> bool:
    """Let `model` read packed rows beside what it reads already; False if it can't.

    It can't if its architecture is not one of `PACKABLE`, or if its attention was chosen to be another than torch's.
    """
    known = model.config.model_type in PACKABLE and type(model).__module__.startswith("transformers.models.")
    if not known or getattr(model.config, "add_cross_attention", False):
        return False
    if model.config._attn_implementation not in ("sdpa", _NAME):
        return False
    if model.config._attn_implementation != _NAME:
        model.set_attn_implementation(_NAME)
        layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        _LastMlp(layers[-1])
    return True


class _LastMlp:
    """Stands in for the forward of the last layer's MLP: that of the tokens that are asked about, 0 for the others.

    The layer's attention tells which; it does so again where activations are recomputed.
    """

    def __init__(self, layer: nn.Module) -> None:
        mlp: Any = layer.mlp
        self._plain = mlp.forward
        self._asked: Tensor | None = None
        mlp.forward = self
        attention_module: Any = getattr(layer, "attn", None) or layer.self_attn
        attention_module.register_forward_pre_hook(self._note, with_kwargs=True)

    def __call__(self, hidden_states: Tensor) -> Any:
        asked, self._asked = self._asked, None
        if asked is None:
            return self._plain(hidden_states)
        outputs = self._plain(hidden_states.index_select(1, asked))
        return torch.zeros_like(hidden_states, dtype=outputs.dtype).index_copy(1, asked, outputs)

    def _note(self, _attention: nn.Module, _arguments: Any, kwargs: dict[str, Any]) -> None:
        packed_rows: PackedRows | None = kwargs.get("packed_rows")
        self._asked = None if packed_rows is None else packed_rows.asked


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed_rows: PackedRows | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query, key, value [batch, heads, time, width] → [batch, time, heads, width].

    With `packed_rows`: batch 1, and `attention_mask` says nothing.
    """
    if packed_rows is None:
        output: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return output
    query, key, value = (_spread(states, packed_rows) for states in (query, key, value))
    window: int = kwargs.get("sliding_window") or packed_rows.longest
    limited = packed_rows.longest > window
    spread = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=_within(window, packed_rows.longest, query.device) if limited else None,
        dropout_p=kwargs.get("dropout", 0.0),
        is_causal=not limited,
        scale=kwargs.get("scaling"),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return spread.transpose(1, 2).flatten(0, 1).index_select(0, packed_rows.slots)[None], None


def _spread(states: Tensor, rows: PackedRows) -> Tensor:
    """[1, heads, tokens, width] → [rows, heads, longest, width], 0 on padding."""
    by_token = states[0].transpose(0, 1)
    spread = by_token.new_zeros(rows.count * rows.longest, *by_token.shape[1:]).index_copy(0, rows.slots, by_token)
    return spread.view(rows.count, rows.longest, *by_token.shape[1:]).transpose(1, 2)


def _within(window: int, longest: int, device: torch.device) -> Tensor:
    """bool [longest, longest]: which keys a query sees that sees itself and the `window` − 1 before it."""
    distance = torch.arange(longest, device=device)[:, None] - torch.arange(longest, device=device)
    return (distance >= 0) & (distance < window)


AttentionInterface.register(_NAME, attention)
AttentionMaskInterface.register(_NAME, sdpa_mask)
