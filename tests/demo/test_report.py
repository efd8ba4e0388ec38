from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from demo.processes import Endpoint
from demo.report import ReportError, print_report, write_report

ENDPOINTS = {
    "reward_server": Endpoint(11, "127.0.0.1:5001", "http://127.0.0.1:6001/metrics"),
    "policy_server": Endpoint(12, "127.0.0.1:5002", "http://127.0.0.1:6002/metrics"),
    "trainer": Endpoint(13, None, "http://127.0.0.1:6003/metrics"),
}


def evaluation(step: int, reward: float | None) -> dict[str, Any]:
    return {
        "kind": "evaluation",
        "step": step,
        "reward_mean": reward,
        "kl_mean": 0.5 * step,
        "distinct_fraction": 1.0,
        "length_mean": 20.0,
        "prompts": 2,
    }


def sample(step: int, row: int, completion: str) -> dict[str, Any]:
    return {"kind": "evaluation", "step": step, "row": row, "prompt": "It is", "completion": completion, "reward": 0.5}


def write(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_report_compares_the_first_and_the_last_evaluation(tmp_path: Path) -> None:
    step = {"kind": "step", "step": 1, "reward_mean": 0.2, "objective/kl": 0.1, "rollout/length_mean": 21.0}
    write(tmp_path / "metrics.jsonl", [evaluation(0, 0.1), step, evaluation(1, 0.3), evaluation(2, 0.9)])
    report = write_report(tmp_path, seconds=9.0, seconds_training=8.0, endpoints=ENDPOINTS)
    written = json.loads((tmp_path / "report.json").read_text())
    assert (report.reward_before, report.reward_after, report.kl, report.steps) == (0.1, 0.9, 1.0, 2)
    assert written["pids"] == {"reward_server": 11, "policy_server": 12, "trainer": 13}
    assert written["ports"] == {"reward_server": 5001, "policy_server": 5002, "trainer": 6003}
    assert 'data-chart="reward_mean"' in (tmp_path / "report.html").read_text()


def test_a_run_without_two_evaluations_has_no_report(tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", [evaluation(0, 0.1)])
    with pytest.raises(ReportError, match="1 evaluations"):
        write_report(tmp_path, seconds=1, seconds_training=1, endpoints=ENDPOINTS)


def test_samples_stand_side_by_side_and_are_never_read_as_markup(tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", [evaluation(0, None), evaluation(2, 0.9)])
    samples = [sample(0, 0, " dull [/red]"), sample(0, 1, " b"), sample(2, 1, " y"), sample(2, 0, " great [bold]")]
    write(tmp_path / "samples.jsonl", samples)
    report = write_report(tmp_path, seconds=1, seconds_training=1, endpoints=ENDPOINTS)
    console = Console(file=io.StringIO(), width=160)
    print_report(console, report, tmp_path, reward="vader")
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    (line,) = [line for line in shown.splitlines() if "dull" in line]
    assert "dull [/red]" in line
    assert "great [bold]" in line
