"""Reward for completions that match a regular expression."""

from __future__ import annotations

import re

from pydantic import ConfigDict, field_validator
from pydantic.dataclasses import dataclass


@dataclass(config=ConfigDict(extra="forbid"), frozen=True)
class RegexReward:
    """`match` for a completion in which `pattern` (Python's re syntax) is found anywhere, `otherwise` for the rest."""

    pattern: str
    match: float = 1.0
    otherwise: float = 0.0

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        return pattern

    def __call__(self, prompts: list[str], completions: list[str]) -> list[float]:
        """One reward per completion."""
        found = re.compile(self.pattern)
        return [self.match if found.search(completion) else self.otherwise for completion in completions]
