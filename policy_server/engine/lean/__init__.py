"""Decode steps of the commonest architectures, written out.

A forward of one token per row is short: between its matrix products transformers' modules spend as long as in them.
These forwards read the weights of the same modules, and are used only where they give the same logits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from policy_server.engine.cache import GrowingLayer, new_cache
from policy_server.engine.lean.gpt2 import LeanGpt2
from policy_server.engine.lean.llama import LeanLlama
from policy_server.engine.lean.parts import LeanForward

_log = logging.getLogger(__name__)

_FORWARDS: Mapping[str, Callable[[Any], LeanForward]] = {
    "GPT2LMHeadModel": LeanGpt2,
    "LlamaForCausalLM": LeanLlama,
    "MistralForCausalLM": LeanLlama,
    "Qwen2ForCausalLM": LeanLlama,
    "Qwen3ForCausalLM": LeanLlama,
}
_PROBE_TOKENS = 5
_TOLERANCE = 1e-4


def lean_forward(module: PreTrainedModel) -> LeanForward | None:
    """The written-out decode step of `module`; None where there is none, or where its logits would differ.

    It keeps the forwards that the linear layers have now.
    """
    make = _FORWARDS.get(type(module).__name__)
    if make is None or not type(module).__module__.startswith("transformers.models."):
        return None
    if any(type(layer) is not GrowingLayer for layer in new_cache(module.config, growing=True).layers):
        return None  # sliding windows and the like
    lean = make(module)
    if _agrees(module, lean):
        return lean
    _log.info("%s decodes by its own forward: the written-out one differs for its settings", type(module).__name__)
    return None


def _agrees(module: PreTrainedModel, lean: LeanForward) -> bool:
    """Whether both forwards make the same of a token that follows others, padded and not."""
    token_ids = torch.arange(2 * _PROBE_TOKENS, device=module.device).view(2, -1) % module.config.vocab_size
    mask = torch.ones_like(token_ids)
    mask[0, :2] = 0
    positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    caches = []
    with torch.inference_mode():
        for _ in range(2):
            cache = new_cache(module.config, growing=True)
            known = {"attention_mask": mask[:, :-1], "position_ids": positions[:, :-1]}
            module(input_ids=token_ids[:, :-1], past_key_values=cache, use_cache=True, **known)
            caches.append(cache)
        last = {"attention_mask": mask, "position_ids": positions[:, -1:]}
        expected = module(input_ids=token_ids[:, -1:], past_key_values=caches[0], use_cache=True, **last).logits[:, -1]
        logits = lean.logits(token_ids[:, -1], positions[:, -1], mask, caches[1])
    tolerance = _TOLERANCE * float(expected.nan_to_num().abs().max())
    return torch.allclose(logits, expected, rtol=_TOLERANCE, atol=tolerance, equal_nan=True)
