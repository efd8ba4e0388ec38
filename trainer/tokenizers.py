"""Tokenizers as files that old and new transformers open."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Protocol

# transformers 5 writes its new name for the class of a tokenizer that is nothing but a tokenizer.json. Version 4,
# which TRL 0.11 runs on, knows the old name only; version 5 reads both.
_RENAMED = {"TokenizersBackend": "PreTrainedTokenizerFast"}


class Saveable(Protocol):
    """A tokenizer, or a model: what transformers saves."""

    def save_pretrained(self, folder: Any, /) -> Any:
        """Write it to `folder`."""
        ...


def save_tokenizer(tokenizer: Saveable, folder: str | os.PathLike[str]) -> None:
    """`tokenizer.save_pretrained(folder)`, with a class name that transformers 4 understands too."""
    tokenizer.save_pretrained(folder)
    path = Path(folder) / "tokenizer_config.json"
    if not path.is_file():  # a tokenizer of another make has its own files
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    if (name := config.get("tokenizer_class")) in _RENAMED:
        config["tokenizer_class"] = _RENAMED[name]
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
