"""Prompts for PPO: the first words of reviews, some of them held out."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from demo.corpus import Review, write_atomically

HELD_OUT_REVIEWS = 400
"""Of the demo: so many neither its model nor PPO sees."""
EVALUATION_PROMPTS = 128

_SHORTEST, _LONGEST = 4, 6
_FEWEST_WORDS_LEFT = 4


@dataclass(frozen=True)
class Split:
    """Reviews to train on, and those that neither the base model nor PPO ever trains on."""

    train: list[Review]
    held_out: list[Review]


@dataclass(frozen=True)
class PromptFiles:
    """JSONL files with the columns prompt, answer (how the review went on), rating and id."""

    train: Path
    evaluation: Path


def split_reviews(reviews: Sequence[Review], *, held_out: int, seed: int = 0) -> Split:
    """The same split every time; fewer than half are held out."""
    shuffled = list(reviews)
    random.Random(seed).shuffle(shuffled)
    count = min(held_out, len(shuffled) // 2)
    return Split(train=shuffled[count:], held_out=shuffled[:count])


def write_prompts(folder: Path, split: Split, *, evaluation_prompts: int) -> PromptFiles:
    """Write both files; no prompt of the evaluation is a prompt of the training."""
    evaluation = _distinct_rows(split.held_out, set())[:evaluation_prompts]
    train = _distinct_rows(split.train, {str(row["prompt"]) for row in evaluation})
    files = PromptFiles(folder / "prompts.jsonl", folder / "held-out-prompts.jsonl")
    for path, rows in ((files.train, train), (files.evaluation, evaluation)):
        write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    return files


def halves(review: Review) -> tuple[str, str] | None:
    """The first 4 to 6 words (by the review's number, so always as many) and the rest; None if that is too short."""
    count = random.Random(review.id).randint(_SHORTEST, _LONGEST)
    words = review.text.split()
    prompt, answer = words[:count], words[count:]
    return (" ".join(prompt), " ".join(answer)) if len(answer) >= _FEWEST_WORDS_LEFT else None


def _distinct_rows(reviews: Sequence[Review], taken: set[str]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for review in reviews:
        prompt, answer = halves(review) or ("", "")
        if prompt and prompt not in taken:
            taken.add(prompt)
            rows.append({"prompt": prompt, "answer": answer, "rating": round(review.rating, 2), "id": review.id})
    return rows
