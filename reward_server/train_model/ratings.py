"""Rated texts: read from a table, and split so that no text is on both sides."""

from __future__ import annotations

import csv
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.logs import get_logger

_log = get_logger(__name__)


class TrainingDataError(ValueError):
    """What is wrong with the data or with what is to be made of it; the message is for the person who gave them."""


@dataclass(frozen=True)
class Rated:
    """A text and what people think of it; higher is better."""

    text: str
    rating: float


def read_ratings(path: Path, *, text: str = "text", rating: str = "rating") -> list[Rated]:
    """The rows of a .csv, .tsv, .jsonl or .parquet file; rows without a text or a rating are left out and counted.

    Raises TrainingDataError, naming the row or the columns that there are.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise TrainingDataError(f"{path}: a table is one of {', '.join(_READERS)}")
    rated, without = [], 0
    try:
        for number, row in enumerate(reader(path), start=1):
            if text not in row or rating not in row:
                raise TrainingDataError(
                    f"{path}: row {number} has no column {text if text not in row else rating!r}; "
                    f"it has {', '.join(map(repr, row))}"
                )
            if row[text] in (None, "") or row[rating] in (None, ""):
                without += 1
            else:
                rated.append(Rated(_text(row[text], path, number), _rating(row[rating], path, number)))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TrainingDataError(f"{path} cannot be read: {error}") from error
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


def _read_csv(path: Path) -> Iterator[Mapping[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        yield from csv.DictReader(file)


def _read_tsv(path: Path) -> Iterator[Mapping[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        yield from csv.DictReader(file, dialect="excel-tab")


def _read_jsonl(path: Path) -> Iterator[Mapping[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise TrainingDataError(f"{path}: line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise TrainingDataError(f"{path}: line {number} is not a JSON object")
            yield row


def _read_parquet(path: Path) -> Iterable[Mapping[str, Any]]:
    try:
        from pyarrow import lib, parquet
    except ModuleNotFoundError as error:
        raise TrainingDataError(f"{path}: .parquet needs the package pyarrow: pip install pyarrow") from error
    try:
        rows: list[Mapping[str, Any]] = parquet.read_table(path).to_pylist()  # type: ignore[no-untyped-call]
    except lib.ArrowInvalid as error:
        raise TrainingDataError(f"{path} is not a Parquet file: {error}") from error
    return rows


_READERS: dict[str, Callable[[Path], Iterable[Mapping[str, Any]]]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


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
