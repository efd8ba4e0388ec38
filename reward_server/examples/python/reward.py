"""The reward itself. Put your own in place of this file's arithmetic; nothing here knows of gRPC."""

from __future__ import annotations

from dataclasses import dataclass

NAME = "answer"
# Change it with every change that could change a score: trainers pin it for a run.
VERSION = "1"
REQUIRED_COLUMN = "answer"

# str.strip() without an argument takes many more for white space; the rules name four.
_WHITE_SPACE = " \t\n\r"
_MARKS = (".", "!", "?")
_FREE_LENGTH = 64
_PENALTY_SPAN = 256


@dataclass(frozen=True)
class Reward:
    """What a completion is worth, in parts."""

    match: float
    format: float
    length: float

    @property
    def value(self) -> float:
        """The reward; the order of the additions is part of the rules."""
        return (self.match + self.format) + self.length


def reward_of(completion: str, reference: str) -> Reward:
    """Does the completion give the reference answer, end like a sentence, and keep short?"""
    text = completion.strip(_WHITE_SPACE)
    marked = text.endswith(_MARKS)
    answer = text[:-1].strip(_WHITE_SPACE) if marked else text
    return Reward(
        match=1.0 if answer == reference.strip(_WHITE_SPACE) else 0.0,
        format=0.25 if marked else 0.0,
        length=-min(1.0, max(0, len(completion) - _FREE_LENGTH) / _PENALTY_SPAN),
    )
