"""Tokenizers as files that old and new transformers open."""

from __future__ import annotations

import json
import os
from pathlib import Path

from transformers import PreTrainedTokenizerBase

# transformers 5 writes its new name for the class of a tokenizer that is nothing but a tokenizer.json. Version 4,
# which TRL 0.11 runs on, knows the old name only; version 5 reads both.
_RENAMED = {"TokenizersBackend": "PreTrainedTokenizerFast"}


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | os.PathLike[str]) -> None:
    """`tokenizer.save_pretrained(folder)`, with a class name that transformers 4 understands too."""
    tokenizer.save_pretrained(folder)
    path = Path(folder) / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if (name := config.get("tokenizer_class")) in _RENAMED:
        config["tokenizer_class"] = _RENAMED[name]
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
