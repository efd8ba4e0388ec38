"""Tables of a run: what it is, its numbers at both ends, its settings, its drops."""

from __future__ import annotations

import enum
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.report.charts import seconds_by_phase
from trainer.report.reading import Line, Run, best_step, points
from trainer.settings import TrainerSettings

MOST_AT_AN_END = 10


@dataclass(frozen=True)
class Row:
    """A line of a table: its name and a cell for each column."""

    name: str
    cells: Sequence[str]
    hint: str = ""


def identity(runs: Sequence[Run]) -> list[Row]:
    """What each run is and how far it got."""
    return [
        Row("Run id", [run.run_id for run in runs]),
        Row("PPO steps", [_steps(run) for run in runs]),
        Row("Starts of the trainer", [_starts(run) for run in runs]),
        Row(
            "Time in steps, evaluations and checkpoints",
            [duration(sum(seconds_by_phase(run).values())) for run in runs],
        ),
        Row(
            "Last number written",
            [f"{run.written_at:%Y-%m-%d %H:%M:%S} UTC" if run.written_at else "–" for run in runs],
        ),
        *(
            Row(name, [_setting(run.settings, *settings) for run in runs])
            for name, settings in (
                ("Model", ("model",)),
                ("Reference", ("reference", "reference_model")),
                ("Policy server", ("policy_server",)),
                ("Reward server", ("reward_server",)),
                ("Prompts", ("data",)),
            )
        ),
        Row("Reward version", [run.reward_version or "–" for run in runs], "known from the first checkpoint on"),
        *(
            Row(name, [_setting(run.settings, setting) for run in runs])
            for name, setting in (
                ("Temperature", "temperature"),
                ("Longest completion, tokens", "max_new_tokens"),
                ("Completions per step", "batch_size"),
                ("Passes over a batch", "ppo_epochs"),
                ("Learning rate", "learning_rate"),
                ("KL coefficient at the start", "init_kl_coef"),
            )
        ),
    ]


def both_ends(runs: Sequence[Run]) -> list[Row]:
    """Numbers at the start and at the end of each run, two cells a run.

    Of training steps the means of the first tenth and of the last, of at most MOST_AT_AN_END steps.
    """
    rows = [
        Row(f"Held-out {title}", [cell for run in runs for cell in _ends(run.evaluations, name, average=1)])
        for title, name in (
            ("reward", "reward_mean"),
            ("KL, nats per completion", "kl_mean"),
            ("length, tokens", "length_mean"),
            ("distinct completions", "distinct_fraction"),
        )
    ]
    rows += [
        Row(title, [cell for run in runs for cell in _ends(run.steps, name, average=MOST_AT_AN_END)])
        for title, name in (
            ("Training reward", "reward_mean"),
            ("Training KL, nats per completion", "objective/kl"),
            ("Entropy, nats per token", "ppo/policy/entropy"),
            ("Completion tokens per second", "throughput/tokens_per_second"),
        )
    ]
    return [row for row in rows if set(row.cells) != {"–"}]


def best(run: Run) -> str:
    """The best evaluation, in words."""
    step = best_step(run.evaluations)
    if step is None:
        return "no held-out completion was judged yet"
    reward = next(reward for at, reward in points(run.evaluations, "reward_mean") if at == step)
    return f"best held-out reward {told(reward)} at step {step}"


def time_table(run: Run) -> list[Row]:
    """Seconds and share of each phase."""
    seconds = seconds_by_phase(run)
    whole = sum(seconds.values())
    return [Row(phase, [duration(spent), f"{spent / whole:.1%}"]) for phase, spent in seconds.items()]


def drop_table(run: Run) -> list[Row]:
    """How many prompts were dropped and why, by reason and code."""
    return [Row(drop.reason, [drop.code or "–", f"{drop.count:,}", drop.said or "–"]) for drop in run.drops]


def changed_settings(runs: Sequence[Run]) -> list[Row]:
    """One run: settings that are not the default, default first. Two runs: settings in which they differ."""
    if len(runs) > 1:
        names = list(dict.fromkeys(name for run in runs for name in run.settings))
        values = {name: [_text(run.settings.get(name)) for run in runs] for name in names}
        return [Row(name, cells, _meaning(name)) for name, cells in values.items() if len(set(cells)) > 1]
    (run,) = runs
    return [
        Row(name, [_text(default), _text(value)], _meaning(name))
        for name, value in run.settings.items()
        if (default := _default(name)) is not _NONE and _text(default) != _text(value)
    ]


def all_settings(runs: Sequence[Run]) -> list[Row]:
    """Every setting of the last start."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    return [Row(name, [_text(run.settings.get(name)) for run in runs], _meaning(name)) for name in names]


def told(value: float | None) -> str:
    """Four digits that mean something; – for what is undefined."""
    return "–" if value is None else f"{value or 0.0:.4g}"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.1f} min" if minutes < 60 else f"{hours:.1f} h"


def _steps(run: Run) -> str:
    done = run.steps[-1]["step"] if run.steps else 0
    planned = run.number("steps")
    return f"{done:,} of {planned:,.0f}" if planned is not None else f"{done:,}"


def _starts(run: Run) -> str:
    resumed = run.resumed_after()
    after = f", resumed after step {', '.join(map(str, resumed))}" if resumed else ""
    return f"{'–' if run.incarnation is None else run.incarnation}{after}"


def _ends(lines: Sequence[Line], name: str, *, average: int) -> tuple[str, str]:
    defined = [value for _, value in points(lines, name) if value is not None]
    if not defined:
        return "–", "–"
    count = max(1, min(average, len(defined) // 10))
    return told(statistics.fmean(defined[:count])), told(statistics.fmean(defined[-count:]))


def _setting(settings: Mapping[str, Any], *names: str) -> str:
    return " ".join(_text(settings[name]) for name in names if settings.get(name) is not None) or "–"


_NONE = object()


def _default(name: str) -> Any:
    field = TrainerSettings.model_fields.get(name)
    if field is None or field.is_required():
        return _NONE
    value = field.get_default(call_default_factory=True, validated_data={})
    return value.value if isinstance(value, enum.Enum) else value


def _text(value: Any) -> str:
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "unset"
    return str(value)


def _meaning(name: str) -> str:
    field = TrainerSettings.model_fields.get(name)
    if field is None:
        return ""
    unit = field.json_schema_extra.get("unit") if isinstance(field.json_schema_extra, dict) else None
    return f"{field.description} [{unit}]" if unit else field.description or ""
