"""Sentiment of the completion by VADER (Hutto & Gilbert 2014): a lexicon and rules, no model."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass


@dataclass(config=ConfigDict(extra="forbid"), frozen=True)
class VaderReward:
    """VADER's compound score of each completion, −1 (most negative) to 1 (most positive).

    text: score the `completion` alone, or prompt and completion together (`both`), as TRL's sentiment example does.

    Raises ModuleNotFoundError at construction when vaderSentiment is not installed.
    """

    text: Literal["completion", "both"] = "completion"

    def __post_init__(self) -> None:
        try:
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "the reward 'vader' needs the package vaderSentiment: pip install 'rlhf-services[reward]'"
            ) from error
        object.__setattr__(self, "_analyzer", SentimentIntensityAnalyzer())  # type: ignore[no-untyped-call]

    def __call__(self, prompts: list[str], completions: list[str]) -> list[float]:
        """One compound score per completion."""
        texts = completions
        if self.text == "both":
            texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        return [self._analyzer.polarity_scores(text)["compound"] for text in texts]  # type: ignore[attr-defined]
