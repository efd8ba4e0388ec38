"""Ratings as text, a line each."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Iterable

from reward_server.human.tickets import ExportRow

# Spreadsheets take a cell that begins with one of these for a formula, which may run programs and fetch addresses.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


def jsonl_line(row: ExportRow) -> str:
    """A JSON object and a line break; nothing in it is changed."""
    return json.dumps(dataclasses.asdict(row), ensure_ascii=False, allow_nan=False) + "\n"


def csv_line(row: ExportRow) -> str:
    """A record of CSV (RFC 4180). A text that a spreadsheet would take for a formula has an apostrophe before it."""
    return _record(_safe(value) for value in dataclasses.astuple(row))


def _safe(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def _record(cells: Iterable[object]) -> str:
    line = io.StringIO()
    csv.writer(line).writerow(cells)
    return line.getvalue()


CSV_HEADER = _record(field.name for field in dataclasses.fields(ExportRow))
