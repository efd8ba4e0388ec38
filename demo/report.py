"""What the run came to: numbers for report.json, the page of the run, and tables for the person who watched."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from demo.processes import Endpoint
from trainer.report.page import write_page


class ReportError(Exception):
    """The run's files lack what the report needs."""


@dataclass(frozen=True)
class Report:
    """report.json. Rewards and lengths (tokens) are means over the held-out prompts; `kl` is the mean over them of the
    sum over tokens, in nats; `distinct` is the number of different completions over that of all.
    """

    reward_before: float | None
    reward_after: float | None
    kl: float | None
    distinct_before: float
    distinct_after: float
    length_before: float
    length_after: float
    prompts: int
    steps: int
    seconds: float
    seconds_training: float
    pids: dict[str, int]
    ports: dict[str, int | None]
    metrics_urls: dict[str, str | None]


def write_report(
    run_dir: Path, *, seconds: float, seconds_training: float, endpoints: Mapping[str, Endpoint]
) -> Report:
    """Write report.json and report.html from the run's files. Raises ReportError without two evaluations."""
    lines = read_jsonl(run_dir / "metrics.jsonl")
    evaluations = [line for line in lines if line["kind"] == "evaluation"]
    if len(evaluations) < 2:
        raise ReportError(f"{run_dir / 'metrics.jsonl'} has {len(evaluations)} evaluations; two are needed")
    before, after = evaluations[0], evaluations[-1]
    report = Report(
        reward_before=before["reward_mean"],
        reward_after=after["reward_mean"],
        kl=after["kl_mean"],
        distinct_before=before["distinct_fraction"],
        distinct_after=after["distinct_fraction"],
        length_before=before["length_mean"],
        length_after=after["length_mean"],
        prompts=after["prompts"],
        steps=after["step"],
        seconds=round(seconds, 1),
        seconds_training=round(seconds_training, 1),
        pids={name: endpoint.pid for name, endpoint in endpoints.items()},
        ports={name: endpoint.port for name, endpoint in endpoints.items()},
        metrics_urls={name: endpoint.metrics_url for name, endpoint in endpoints.items()},
    )
    (run_dir / "report.json").write_text(json.dumps(asdict(report), indent=2) + "\n")
    write_page([run_dir], run_dir / "report.html")
    return report


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """One mapping per line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def print_report(console: Console, report: Report, run_dir: Path, *, reward: str) -> None:
    """Before and after, as numbers and as text."""
    numbers = Table(title=f"{report.prompts} held-out prompts, {report.steps} PPO steps")
    for heading in ("", "before", "after"):
        numbers.add_column(heading, justify="left" if not heading else "right")
    numbers.add_row(
        f"mean reward ({reward})", _number(report.reward_before), _number(report.reward_after), style="bold"
    )
    numbers.add_row("KL to the base model, nats per completion", "0", _number(report.kl))
    numbers.add_row("distinct completions", f"{report.distinct_before:.0%}", f"{report.distinct_after:.0%}")
    numbers.add_row("mean length, tokens", f"{report.length_before:.1f}", f"{report.length_after:.1f}")
    console.print(numbers)
    console.print(samples_table(read_jsonl(run_dir / "samples.jsonl"), count=5))


def samples_table(lines: Sequence[Mapping[str, Any]], *, count: int) -> Table:
    """The first held-out prompts with their completions before and after."""
    evaluations = [line for line in lines if line["kind"] == "evaluation"]
    steps = [line["step"] for line in evaluations]
    first = [line for line in evaluations if line["step"] == min(steps, default=0)]
    last = {line["row"]: line for line in evaluations if line["step"] == max(steps, default=0)}
    table = Table(title="The same prompts, before and after", show_lines=True)
    table.add_column("before", ratio=1)
    table.add_column("after", ratio=1)
    for line in [line for line in first if line["row"] in last][:count]:
        table.add_row(_sample(line), _sample(last[line["row"]]))
    return table


def _sample(line: Mapping[str, Any]) -> Text:
    # Text, not markup: a completion may hold anything.
    return Text.assemble(
        (str(line["prompt"]), "dim"), str(line["completion"]), (f"  [{_number(line['reward'])}]", "cyan")
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
