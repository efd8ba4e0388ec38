"""Text out of a stream of tokens: whole characters only, special tokens skipped, stop strings never shown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\ufffd"

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_LONGEST_UNSETTLED_WINDOW = 64


class TokenDecoder:
    """`tokenizer.decode` as the contract defines text; one per tokenizer, shared by all completions.

    It must have a tokenizer of its own: fast tokenizers refuse to be used by two threads at once.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # Byte-fallback tokens decode as a run: one ill-formed byte turns the whole run into U+FFFD, looking back.
        self.byte_token_ids = frozenset(
            index for token, index in tokenizer.get_vocab().items() if _BYTE_TOKEN.fullmatch(token)
        )
        self.skipped_token_ids = frozenset(
            index for index, token in tokenizer.added_tokens_decoder.items() if token.special
        )

    def __call__(self, token_ids: Sequence[int]) -> str:
        """Decode without special tokens; ill-formed bytes come out as U+FFFD."""
        text: str = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


class IncrementalText:
    """Turns tokens into text piece by piece; the pieces add up to the decoding of all tokens.

    Only a window of the last tokens is decoded each time. It starts at the last-but-one border between whole
    characters, because some tokenizers decode a token differently when nothing stands before it.
    """

    def __init__(self, decoder: TokenDecoder) -> None:
        self._decode = decoder
        self._ids: list[int] = []
        self._window = 0  # first token of the window
        self._border = 0  # the last border between whole characters
        self._shown = 0  # characters of the window that were given out
        self._text = ""
        self._in_byte_run = False

    def push(self, token_ids: Sequence[int]) -> str:
        """Add tokens and return the text that they settle; what could still change is held back."""
        self._ids.extend(token_ids)
        for token_id in token_ids:
            if token_id not in self._decode.skipped_token_ids:
                self._in_byte_run = token_id in self._decode.byte_token_ids
        if self._in_byte_run or not token_ids:
            return ""
        window = self._decode(self._ids[self._window :])
        # The last U+FFFD may be a character whose bytes are not all here.
        settled = window[:-1] if window.endswith(REPLACEMENT) else window
        piece = settled[self._shown :]
        self._shown = max(self._shown, len(settled))
        self._text += piece
        if settled == window and piece:
            self._window, self._border = self._border, len(self._ids)
            self._shown = len(self._decode(self._ids[self._window :]))
        elif len(self._ids) - self._window > _LONGEST_UNSETTLED_WINDOW:
            self._cut(window)
        return piece

    def unsettled(self) -> str:
        """Whole characters that are held back only because ill-formed bytes after them would change their decoding."""
        if not self._in_byte_run:
            return ""
        return self._decode(self._ids[self._window :])[self._shown :].rstrip(REPLACEMENT)

    def finish(self) -> str:
        """Return the rest, an incomplete character as U+FFFD."""
        whole = self._decode(self._ids)
        if not whole.startswith(self._text):  # a decoder that looks back: what was given out stays
            whole = self._text + self._decode(self._ids[self._window :])[self._shown :]
        rest = whole[len(self._text) :]
        self._text = whole
        return rest

    def _cut(self, window: str) -> None:
        """Drop the older half of a window that never settles (ill-formed bytes), where that changes nothing."""
        middle = self._window + _LONGEST_UNSETTLED_WINDOW // 2
        left, right = self._decode(self._ids[self._window : middle]), self._decode(self._ids[middle:])
        if right and left + right == window and self._shown >= len(left):
            self._shown -= len(left)
            self._window = self._border = middle


class StopStrings:
    """Finds the first stop string in a text that comes in pieces, and holds back what may become one.

    First is the one that is complete first, and of several that end together the longest. `before` is text that
    stands before the pieces (of a completion that goes on): a stop string may begin in it, but none of it is given out.
    """

    def __init__(self, stop_strings: Sequence[str], *, before: str = "") -> None:
        self._stop_strings = stop_strings
        self._held = ""
        self._foreign = 0  # leading characters of `_held` that belong to `before`
        self.found = ""
        if before and stop_strings:
            self._held = before[len(before) - self._may_begin(before) :]
            self._foreign = len(self._held)

    def push(self, text: str) -> str:
        """Add text and return what may be shown; sets `found` when a stop string is complete."""
        if self.found or not text:
            return ""
        self._held += text
        hits = [
            (position + len(stop), -len(stop), stop)
            for stop in self._stop_strings
            if (position := self._held.find(stop)) >= 0
        ]
        if hits:
            end, negative_length, self.found = min(hits)
            return self._release(end + negative_length)
        return self._release(len(self._held) - self._may_begin(self._held))

    def would_find(self, text: str) -> bool:
        """Whether a stop string would be complete if `text` came next."""
        return bool(text) and any(stop in self._held + text for stop in self._stop_strings)

    def finish(self) -> str:
        """Return what was held back, now that nothing follows."""
        return "" if self.found else self._release(len(self._held))

    def _may_begin(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        longest = max((len(stop) for stop in self._stop_strings), default=1) - 1
        return next(
            (
                size
                for size in range(min(longest, len(text)), 0, -1)
                if any(len(stop) > size and stop.startswith(text[-size:]) for stop in self._stop_strings)
            ),
            0,
        )

    def _release(self, size: int) -> str:
        foreign = min(self._foreign, size)
        self._foreign -= foreign
        released, self._held = self._held[foreign:size], self._held[size:]
        return released
