"""Digests by which a trainer recognises the reference and the tokenizer that a server really has."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
import xxhash
from torch import Tensor

from rlhf.tensors import byte_view, dtype_name


def weights_digest(named_tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> str:
    """ "xxh3_128:<hex>" over names, shapes and bytes, by ascending name, each tensor cast to `dtype`.

    Give `model.named_parameters()`, which lists a tied parameter once. Casting lets a trainer in float32 recognise
    what a server loaded in bfloat16. One tensor at a time is copied.
    """
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(named_tensors, key=lambda pair: pair[0]):
        digest.update(json.dumps([name, dtype_name(dtype), list(tensor.shape)]).encode())
        digest.update(byte_view(tensor.detach().to("cpu", dtype).contiguous()))
    return f"xxh3_128:{digest.hexdigest()}"


def tokenizer_digest(tokenizer: Any) -> str:
    """ "sha256:<hex>" of what a transformers tokenizer does: vocabulary, merges, special tokens, chat template.

    Padding and truncation settings, which calls change, and paths are left out. So is the choice of the padding token:
    GPT-2's users set it after loading, and no id that crosses the wire depends on it.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described: dict[str, Any] = {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "special": {
            name: str(value) for name, value in sorted(tokenizer.special_tokens_map.items()) if name != "pad_token"
        },
        "chat_template": tokenizer.chat_template,
    }
    if backend is not None:
        rules = json.loads(backend.to_str())
        rules.pop("padding", None)
        rules.pop("truncation", None)
        described["rules"] = rules
    text = json.dumps(described, sort_keys=True, ensure_ascii=True)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
