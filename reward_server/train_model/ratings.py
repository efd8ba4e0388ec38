"""Rated texts: read from a table, and split so that no text is on both sides."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.logs import get_logger
from rlhf.tables import TableError, read_rows

_log = get_logger(__name__)


class TrainingDataError(ValueError):
    """What is wrong with the data or with what is to be made of it; the message is for the person who gave them."""


@dataclass(frozen=True)
class Rated:
    """A text and what people think of it; higher is better."""

    text: str
    rating: float


def read_ratings(path: Path, *, text: str = "text", rating: str = "rating") -> list[Rated]:
    """The rows of a table (see `rlhf.tables`); rows without a text or a rating are left out and counted.

    Raises TrainingDataError, naming the row or the columns that there are.
    """
    rated, without = [], 0
    try:
        for number, row in enumerate(read_rows(path), start=1):
            if text not in row or rating not in row:
                raise TrainingDataError(
                    f"{path}: row {number} has no column {text if text not in row else rating!r}; "
                    f"it has {', '.join(map(repr, row))}"
                )
            if row[text] in (None, "") or row[rating] in (None, ""):
                without += 1
            else:
                rated.append(Rated(_text(row[text], path, number), _rating(row[rating], path, number)))
    except TableError as error:
        raise TrainingDataError(str(error)) from error
    if without:
        _log.warning("rows without a text or a rating are left out", rows=without)
    return rated


def _text(value: Any, path: Path, number: int) -> str:
    if not isinstance(value, str):
        raise TrainingDataError(f"{path}: the text of row {number} is a {type(value).__name__}")
    return value


def _rating(value: Any, path: Path, number: int) -> float:
    try:
        rating = float(value)
    except (TypeError, ValueError):
        rating = math.nan
    if not math.isfinite(rating):
        raise TrainingDataError(f"{path}: the rating of row {number}, {value!r}, is not a finite number")
    return rating


def split(rated: Sequence[Rated], *, held_out: float, seed: int = 0) -> tuple[list[Rated], list[Rated]]:
    """Texts to train on, and about the fraction `held_out` of them to judge by; the same for the same seed.

    Texts that differ in case or white space only stay together.
    """
    alike: dict[str, list[Rated]] = {}
    for each in rated:
        alike.setdefault(" ".join(each.text.split()).casefold(), []).append(each)
    groups = list(alike.values())
    random.Random(seed).shuffle(groups)
    train: list[Rated] = []
    others: list[Rated] = []
    for group in groups:
        (others if len(others) < held_out * len(rated) else train).extend(group)
    return train, others
