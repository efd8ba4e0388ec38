"""What is sent to be judged: contents of the author's own, or short ones that any reward should take."""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_MADE_UP = (
    ("Was the film good?", "It was a joy from the first minute to the last."),
    ("Was the film good?", "No."),
    ("Was the film good?", "Dull, far too long, and badly acted; I left before the end, angry about the ticket."),
    ("What is 6 times 7?", "42"),
    ("What is 6 times 7?", "I think that it is 41, but please check: 6 * 7 = 41."),
    ("Name a colour.", "Blue is wonderful, and so is the sea when the sun is out and the wind is warm and slow."),
    ("Name a colour.", "red"),
    ("Say something kind.", "You did very well today, and I am glad that you came."),
    ("Say something kind.", "Why should I? Kindness is a terrible waste of time."),
    ("Write a list.", "1. bread\n2. butter\n3. tea"),
    ("Write a list.", "- one\n- two\n- three\n- four\n- five\n- six\n- seven"),
    ("Go on: once upon a time", " there was a small server that answered every question it was asked, in order."),
)
# A text, a number and JSON, whichever the column is.
_MADE_UP_VALUE = "1"


@dataclass(frozen=True)
class Content:
    """A prompt, a completion, and the columns of the prompt's row as Python has them from JSON."""

    prompt: str
    completion: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


class Material:
    """Draws contents in an order that the seed decides, each of them before any comes twice.

    metadata: columns for the contents that lack them, as text; what the server needs beyond them is made up.
    """

    def __init__(self, contents: Sequence[Content] = (), metadata: Mapping[str, str] | None = None, seed: int = 0):
        pool = list(contents)
        if len(pool) < len(_MADE_UP):
            pool += [Content(prompt, completion) for prompt, completion in _MADE_UP]
        random.Random(seed).shuffle(pool)
        self._pool = pool
        self._drawn = 0
        self._metadata = dict(metadata or {})
        self.json_keys = sorted(
            {key for content in pool for key, value in content.metadata.items() if not isinstance(value, str)}
        )

    def turn_to(self, name: str) -> None:
        """Draw on from the place of this name, so that it gets the same contents whatever was drawn before."""
        self._drawn = zlib.crc32(name.encode())

    def draw(self, count: int) -> list[Content]:
        """The next `count` contents."""
        first, self._drawn = self._drawn, self._drawn + count
        return self._from(first, count)

    def first(self, count: int) -> list[Content]:
        """The first `count` contents, which are not drawn thereby."""
        return self._from(0, count)

    def columns(self, content: Content, required: Sequence[str]) -> dict[str, str]:
        """The metadata of a content as it is sent, with every column that is required."""
        own = {key: json.dumps(value) if key in self.json_keys else value for key, value in content.metadata.items()}
        return dict.fromkeys(required, _MADE_UP_VALUE) | self._metadata | own

    def _from(self, index: int, count: int) -> list[Content]:
        return [self._pool[each % len(self._pool)] for each in range(index, index + count)]


def token_ids(completion: str) -> list[int]:
    """Ids that a byte tokenizer would give, and one more for EOS: small, so that any vocabulary has them."""
    return [*completion.encode(), 0]


def read_samples(path: Path) -> list[Content]:
    """The contents in a JSONL file; ValueError names the line that is none."""
    contents = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            if item.keys() - {"prompt", "completion", "metadata"}:
                raise ValueError("only prompt, completion and metadata are known")
            content = Content(item.get("prompt", ""), item["completion"], item.get("metadata") or {})
            if not (isinstance(content.prompt, str) and isinstance(content.completion, str)):
                raise ValueError("prompt and completion are texts")
            if not isinstance(content.metadata, dict):
                raise ValueError("metadata is an object")
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f'{path}, line {number}: not {{"prompt", "completion", "metadata"}}: {error}') from None
        contents.append(content)
    if not contents:
        raise ValueError(f"{path} holds no samples")
    return contents
