"""Folders of runs, written line by line as the trainer writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.report.reading import Run

Lines = Sequence[Mapping[str, Any]]


def step(number: int, **numbers: Any) -> dict[str, Any]:
    """A step's line; a double underscore stands for the slash in a name."""
    return {"kind": "step", "step": number, **_slashed(numbers)}


def evaluation(number: int, **numbers: Any) -> dict[str, Any]:
    return {"kind": "evaluation", "step": number, **numbers}


def sample(kind: str, number: int, row: int, completion: str, *, prompt: str = "It is", **more: Any) -> dict[str, Any]:
    return {
        "kind": kind,
        "step": number,
        "row": row,
        "prompt": prompt,
        "completion": completion,
        "reward": 0.5,
        "components": {},
        "tokens": 3,
        "finish_reason": "eos",
        **more,
    }


def write_run(
    folder: Path, metrics: Lines, *, samples: Lines = (), accounting: Lines = (), settings: str = "", run_id: str = "r"
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in (("metrics", metrics), ("samples", samples), ("accounting", accounting)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "settings.yaml").write_text(settings)
    (folder / "run.json").write_text(json.dumps({"run_id": run_id, "incarnation": 1}))
    return folder


def run_of(steps: Lines = (), evaluations: Lines = (), **more: Any) -> Run:
    """A run as it is once read."""
    given: dict[str, Any] = {"settings": {}, **more}
    return Run(
        name="run", run_id="r", incarnation=1, reward_version=None, steps=steps, evaluations=evaluations, **given
    )


def _slashed(numbers: Mapping[str, Any]) -> dict[str, Any]:
    return {name.replace("__", "/"): value for name, value in numbers.items()}
