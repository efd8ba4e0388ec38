from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict, replace

import pytest

from reward_server.human.export import CSV_HEADER, csv_line, jsonl_line
from reward_server.human.tickets import ExportRow

ROW = ExportRow(
    version="human@1",
    run_id="run",
    sample_id="a",
    prompt='Say "hi",\nplease',
    completion="hi",
    messages_json="[]",
    rater="Ada",
    value=-1.0,
    rated_at="2026-01-01T00:00:00.000+00:00",
    outcome="scored",
    reward=-1.0,
    reason="",
)


def read(text: str) -> dict[str, str]:
    (row,) = csv.DictReader(io.StringIO(CSV_HEADER + text, newline=""))
    return row


def test_json_keeps_everything_as_it_is() -> None:
    row = replace(ROW, completion="=1+1 ✓")
    line = jsonl_line(row)
    assert line.count("\n") == 1
    assert json.loads(line) == asdict(row)


def test_csv_is_read_back_by_any_reader() -> None:
    row = read(csv_line(ROW))
    assert row["prompt"] == ROW.prompt
    assert float(row["value"]) == -1.0


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1"])
def test_a_text_that_a_spreadsheet_would_run_is_kept_from_it(text: str) -> None:
    assert read(csv_line(replace(ROW, completion=text)))["completion"] == "'" + text


def test_a_skip_has_no_value_in_either() -> None:
    row = replace(ROW, value=None, reward=None)
    assert read(csv_line(row))["value"] == ""
    assert json.loads(jsonl_line(row))["value"] is None
