"""Untrusted text on a page: always text, whole, and nothing in it hides or turns around what a rater reads."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

# The joiners U+200C and U+200D stay as they are: Persian, Hindi and emoji cannot be written without them.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f]"
)
_MARK = Markup('<span class="unseen" title="{name}">{code}</span>')


def visible(text: str) -> Markup:
    """Escaped text in which each control, direction and zero-width character is a mark that names it."""
    lines = text.replace("\r\n", "\n")
    parts, end = [], 0
    for match in _UNSEEN.finditer(lines):
        parts += [escape(lines[end : match.start()]), _mark(match.group())]
        end = match.end()
    return Markup("").join([*parts, escape(lines[end:])])


def _mark(character: str) -> Markup:
    return _MARK.format(name=unicodedata.name(character, "control character"), code=f"U+{ord(character):04X}")


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation. rest: all of it but role and content (a name, calls of tools …), as JSON; or ""."""

    role: str
    content: str
    rest: str


def prompt_turns(messages_json: str) -> list[Turn]:
    """The conversation up to the last turn of a user; what follows is the completion, which is shown by itself."""
    messages: list[Mapping[str, Any]] = json.loads(messages_json or "[]")
    last = max((at for at, message in enumerate(messages) if message.get("role") == "user"), default=-1)
    return [_turn(message) for message in messages[: last + 1]]


def _turn(message: Mapping[str, Any]) -> Turn:
    rest = {key: value for key, value in message.items() if key not in ("role", "content")}
    return Turn(
        role=str(message.get("role", "")),
        content=_text(message.get("content")),
        rest=json.dumps(rest, ensure_ascii=False, indent=1) if rest else "",
    )


def _text(content: object) -> str:
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
