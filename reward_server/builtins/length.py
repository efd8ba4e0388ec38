"""Reward for the length of the completion."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass


@dataclass(config=ConfigDict(extra="forbid"), frozen=True)
class LengthReward:
    """1 at exactly `target` units, falling linearly to 0 at none and at twice the target, and below 0 beyond that.

    unit: `characters`, or `words` (split at white space).
    """

    target: int = Field(gt=0)
    unit: Literal["characters", "words"] = "words"

    def __call__(self, prompts: list[str], completions: list[str]) -> list[float]:
        """One reward per completion."""
        counts = [len(text.split()) if self.unit == "words" else len(text) for text in completions]
        return [1.0 - abs(count - self.target) / self.target for count in counts]
