"""The question that a judge is asked: a template filled with a sample, whose texts cannot pose as part of it."""

from __future__ import annotations

import hashlib
import json
import string
from typing import Any

from reward_server.kinds import Sample

_OF_THE_SAMPLE = ("prompt", "completion")


class _Template(string.Template):
    # In braces any column's name will do, not only what Python calls an identifier.
    braceidpattern = r"[^{}]+"


class Rubric:
    """A text with $prompt, $completion and $column (or ${any column}) in it; $$ is a dollar sign.

    Only names are replaced and nothing is evaluated. Raises ValueError for what is no such text.
    """

    def __init__(self, text: str) -> None:
        self._template = _Template(text)
        if not self._template.is_valid():
            raise ValueError("a $ must begin $prompt, $completion, $column or ${column}; write $$ for a dollar sign")
        names = self._template.get_identifiers()
        if "completion" not in names:
            raise ValueError("the rubric does not mention $completion, so every completion would get the same score")
        self.columns = tuple(name for name in names if name not in _OF_THE_SAMPLE)

    def filled(self, sample: Sample) -> str:
        """The text for one sample, which has all of `columns`."""
        values = {name: _text(sample.metadata[name]) for name in self.columns}
        given = {
            "prompt": _delimited("prompt", sample.prompt),
            "completion": _delimited("completion", sample.completion),
        }
        text = self._template.substitute(values, **given)
        # A column may hold half a surrogate pair, which no request can carry.
        return text.encode("utf-8", errors="replace").decode()


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)


def _delimited(name: str, text: str) -> str:
    """`text` between tags that hold its own digest: a text cannot contain the tag that ends it."""
    tag = f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    return f"<{tag}>\n{text}\n</{tag}>"
