"""Rows of a table in a file, whatever its format: one mapping from column to value each."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]


class TableError(ValueError):
    """A file that is no table; the message names it, and the line where that can be told."""


def is_table(path: Path) -> bool:
    """Whether `read_rows` knows the format, by the end of the name."""
    return path.suffix.lower() in _READERS


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a .jsonl (or .json, read the same), .csv, .tsv or .parquet file, in order.

    Cells of .csv and .tsv are strings, None where a line ends early. Raises TableError, also for a file that cannot be
    opened.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise TableError(f"{path}: a table is one of {', '.join(_READERS)}")
    try:
        yield from reader(path)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TableError(f"{path} cannot be read: {error}") from error


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise TableError(f"{path}: line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise TableError(f"{path}: line {number} is not a JSON object")
            yield row


def _read_csv(path: Path, dialect: str = "excel") -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as lines:  # spreadsheets begin a file with a byte order mark
        reader = csv.DictReader(lines, dialect=dialect)
        for row in reader:
            if None in row:
                raise TableError(f"{path}: line {reader.line_num} has more cells than the header")
            yield row


def _read_tsv(path: Path) -> Iterator[Row]:
    return _read_csv(path, dialect="excel-tab")


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        from pyarrow import lib, parquet
    except ModuleNotFoundError as error:
        raise TableError(f"{path}: .parquet needs the package pyarrow: pip install pyarrow") from error
    try:
        yield from parquet.read_table(path).to_pylist()  # type: ignore[no-untyped-call]
    except lib.ArrowInvalid as error:
        raise TableError(f"{path} is not a Parquet file: {error}") from error


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}
