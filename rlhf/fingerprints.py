"""Digests by which two processes find out that they hold the same weights and the same tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from torch import Tensor

from rlhf.tensors import byte_view, dtype_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def weights_digest(named_tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> str:
    """ "xxh3_128:" and 32 hex digits over names, shapes and the bytes of each tensor cast to `dtype`, by name.

    The order in which tensors come, their device and their layout in memory don't matter. One tensor at a time is
    copied. Tied parameters count once, as `Module.named_parameters` gives them.
    """
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(named_tensors, key=lambda pair: pair[0]):
        digest.update(json.dumps([name, dtype_name(dtype), list(tensor.shape)]).encode())
        digest.update(byte_view(tensor.detach().to(device="cpu", dtype=dtype).contiguous()))
    return f"xxh3_128:{digest.hexdigest()}"


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """ "sha256:" and 64 hex digits over everything by which text becomes ids and ids become text.

    That is the vocabulary, the merges and the other parts of the backend, the special tokens and the chat template.
    Left out are the padding token and the state of padding and truncation, which callers set as they like, and where
    the tokenizer was loaded from.
    """
    special_tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if name != "pad_token"}
    described = {
        "backend": _backend(tokenizer),
        "special_tokens": special_tokens,
        "chat_template": tokenizer.chat_template,
    }
    text = json.dumps(described, sort_keys=True, default=str)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _backend(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None:
        return {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
    backend: dict[str, Any] = json.loads(fast.to_str())
    del backend["padding"], backend["truncation"]
    return backend
