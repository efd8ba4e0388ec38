"""What a run's folder says, while the run may be writing there: what is cut or garbled is left out and counted."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeGuard

import yaml

Line = Mapping[str, Any]
Points = list[tuple[int, float | None]]
"""(step, value) in the order of steps; None where the number is undefined."""

_LARGEST_STEP = 2**53


class NoRunError(ValueError):
    """The folder holds no run that could be shown; the message names it."""


@dataclass(frozen=True)
class Sample:
    """One line of samples.jsonl; `reward` is None when the completion was not judged."""

    kind: str
    step: int
    row: int
    prompt: str
    completion: str
    reward: float | None
    components: Mapping[str, float]
    tokens: int | None
    finish_reason: str


@dataclass(frozen=True)
class Drop:
    """Prompts that were not trained on for one reason; `code` and `said` (once, as an example) by the reward server."""

    reason: str
    code: str
    count: int
    said: str


@dataclass(frozen=True)
class Run:
    """A run as its files show it."""

    name: str
    run_id: str
    incarnation: int | None
    settings: Mapping[str, Any]
    reward_version: str | None
    steps: Sequence[Line]
    evaluations: Sequence[Line]
    samples: Sequence[Sample] = ()
    drops: Sequence[Drop] = ()
    unreadable: Mapping[str, int] = field(default_factory=dict)
    """Lines that could not be read, by file; a last line that is not ended yet is none of them."""
    written_at: datetime | None = None

    def number(self, setting: str) -> float | None:
        """A setting that is a number; None when it is unset or unknown."""
        return number(self.settings, setting)

    def resumed_after(self) -> list[int]:
        """The steps after which a new start of the trainer went on."""
        return [
            before["step"]
            for before, after in zip(self.steps, self.steps[1:], strict=False)
            if before.get("incarnation") != after.get("incarnation")
        ]


def number(line: Line, name: str) -> float | None:
    """A finite number of a line; None when it is absent, undefined or none."""
    value = line.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


def points(lines: Sequence[Line], name: str) -> Points:
    """One number over the steps, from the lines that have it."""
    return [(line["step"], number(line, name)) for line in lines if name in line]


def read_run(folder: Path, *, name: str) -> Run:
    """Read the run in `folder`, to be called `name`, but for its samples; NoRunError when there is no metrics.jsonl."""
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        raise NoRunError(f"{folder}: there is no metrics.jsonl, so this is no run's folder or nothing has happened yet")
    unreadable: Counter[str] = Counter()
    steps: dict[int, Line] = {}
    evaluations: dict[int, Line] = {}
    for line in _lines(metrics, unreadable):
        if line.get("kind") in ("step", "evaluation") and _is_step(line.get("step")):
            (steps if line["kind"] == "step" else evaluations)[line["step"]] = line
        else:
            unreadable[metrics.name] += 1
    identity = _mapping(folder / "run.json", json.loads)
    incarnation = identity.get("incarnation")
    return Run(
        name=name,
        run_id=str(identity.get("run_id", "unknown")),
        incarnation=incarnation if isinstance(incarnation, int) else None,
        settings=_mapping(folder / "settings.yaml", yaml.safe_load),
        reward_version=_reward_version(folder),
        steps=_by_step(steps),
        evaluations=_by_step(evaluations),
        drops=_drops(folder / "accounting.jsonl", unreadable),
        unreadable=dict(unreadable),
        written_at=datetime.fromtimestamp(metrics.stat().st_mtime, UTC),
    )


def with_samples(run: Run, folder: Path, wanted: Mapping[str, Collection[int]]) -> Run:
    """The run of `folder` with its samples of the steps wanted, by kind ("step" of training, "evaluation")."""
    unreadable = Counter(run.unreadable)
    samples = list(_samples(folder / "samples.jsonl", wanted, unreadable))
    return replace(run, samples=samples, unreadable=dict(unreadable))


def best_step(evaluations: Sequence[Line]) -> int | None:
    """The step of the highest held-out mean reward, the first of equals; None when none was judged."""
    rewards = [(reward, -step) for step, reward in points(evaluations, "reward_mean") if reward is not None]
    return -max(rewards)[1] if rewards else None


def _lines(path: Path, unreadable: Counter[str], *, only_with: bytes = b"") -> Iterator[dict[str, Any]]:
    """The objects of a .jsonl file; what has no line end yet is being written."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for raw in file:
            if not raw.endswith(b"\n"):
                return
            if only_with not in raw or not raw.strip():
                continue
            try:
                line = json.loads(raw.decode("utf-8"), parse_constant=_refuse)
            except (ValueError, RecursionError):
                line = None
            if isinstance(line, dict):
                yield line
            else:
                unreadable[path.name] += 1


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _is_step(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _LARGEST_STEP


def _by_step(lines: Mapping[int, Line]) -> list[Line]:
    return [lines[step] for step in sorted(lines)]


def _samples(path: Path, wanted: Mapping[str, Collection[int]], unreadable: Counter[str]) -> Iterator[Sample]:
    for line in _lines(path, unreadable):
        kind, step, row = line.get("kind"), line.get("step"), line.get("row")
        prompt, completion = line.get("prompt"), line.get("completion")
        if not (_is_step(step) and _is_step(row) and isinstance(prompt, str) and isinstance(completion, str)):
            unreadable[path.name] += 1
        elif isinstance(kind, str) and step in wanted.get(kind, ()):
            components = line.get("components")
            named = components if isinstance(components, dict) else {}
            tokens = number(line, "tokens")
            yield Sample(
                kind=kind,
                step=step,
                row=row,
                prompt=prompt,
                completion=completion,
                reward=number(line, "reward"),
                components={name: value for name in named if (value := number(named, name)) is not None},
                tokens=None if tokens is None else int(tokens),
                finish_reason=str(line.get("finish_reason", "")),
            )


def _drops(path: Path, unreadable: Counter[str]) -> list[Drop]:
    counts: Counter[tuple[str, str]] = Counter()
    said: dict[tuple[str, str], str] = {}
    # Most lines are of trained prompts, and there may be a million of them.
    for line in _lines(path, unreadable, only_with=b'"dropped"'):
        if line.get("outcome") == "dropped":
            why = str(line.get("reason", "unknown")), str(line.get("code", ""))
            counts[why] += 1
            if "said" in line:
                said.setdefault(why, str(line["said"]))
    return [Drop(*why, count, said.get(why, "")) for why, count in counts.most_common()]


def _mapping(path: Path, parse: Callable[[str], Any]) -> Mapping[str, Any]:
    """A small file's mapping; empty when it is not there, or is just being replaced."""
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _reward_version(folder: Path) -> str | None:
    """What the run is pinned to, from the newest checkpoint."""
    states = sorted(
        folder.glob("checkpoints/step-*/trainer_state.json"), key=lambda path: (len(path.parent.name), path.parent.name)
    )
    pins = _mapping(states[-1], json.loads).get("pins") if states else None
    version = pins.get("reward_version") if isinstance(pins, dict) else None
    return version if isinstance(version, str) else None
