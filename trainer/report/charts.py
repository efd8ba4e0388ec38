"""Which curves are shown, in the order in which they are usually asked for."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from trainer.report.reading import Points, Run, number, points
from trainer.report.thinning import envelope, stretches

MOST_POINTS = 800
_MOST_CURVES = 6
_FEW = f"At most {_MOST_CURVES} are drawn, those that most steps name."
_COMPONENT, _DROPPED = "reward/", "samples/dropped_"
PHASES = ("rollout", "learn", "publish", "evaluate", "checkpoint")


@dataclass(frozen=True)
class Curve:
    """One line. `style` says which colour and dash it has, held-out values are dots."""

    label: str
    points: Points
    style: int = 0
    held_out: bool = False

    @property
    def told(self) -> str:
        """The curve in words, for those who can't see it."""
        defined = [(value, step) for step, value in self.points if value is not None]
        if not defined:
            return f"{self.label}: undefined"
        (low, low_step), (high, high_step) = min(defined), max(defined)
        return (
            f"{self.label}: {defined[0][0]:.4g} → {defined[-1][0]:.4g}, lowest {low:.4g} (step {low_step}), "
            f"highest {high:.4g} (step {high_step})"
        )


@dataclass(frozen=True)
class Chart:
    """`floor`: nothing below is drawn; `stacked`: curves lie on each other; `resumes`: steps marked, by run."""

    name: str
    title: str
    unit: str
    curves: Sequence[Curve]
    note: str = ""
    floor: float | None = None
    stacked: bool = False
    resumes: Sequence[Sequence[int]] = field(default_factory=list)


@dataclass(frozen=True)
class Section:
    """Charts that are read together."""

    name: str
    title: str
    charts: Sequence[Chart]


@dataclass(frozen=True)
class _Wanted:
    title: str
    unit: str
    trained: str
    held_out: str | None = None
    note: str = ""
    floor: float | None = None


_SECTIONS: Sequence[tuple[str, str, Sequence[_Wanted]]] = (
    ("reward", "Reward", (_Wanted("Mean reward", "", "reward_mean", "reward_mean"),)),
    (
        "kl",
        "Distance from the reference",
        (
            _Wanted("KL", "nats per completion", "objective/kl", "kl_mean"),
            _Wanted("KL coefficient β", "reward per nat", "objective/kl_coef"),
        ),
    ),
    (
        "completions",
        "Completions",
        (
            _Wanted("Mean length", "tokens", "rollout/length_mean", "length_mean"),
            _Wanted("Distinct completions", "share", "rollout/distinct_fraction", "distinct_fraction"),
            _Wanted("Entropy of the policy", "nats per token", "ppo/policy/entropy"),
        ),
    ),
    (
        "learning",
        "Learning",
        (
            _Wanted("Policy loss", "", "ppo/loss/policy"),
            _Wanted("Value loss", "", "ppo/loss/value"),
            _Wanted("Clipped policy ratios", "share of tokens", "ppo/policy/clipfrac"),
            _Wanted(
                "Explained variance of returns",
                "ratio",
                "ppo/val/var_explained",
                note="1 is perfect, 0 no better than the mean. Drawn from −1 up.",
                floor=-1.0,
            ),
            _Wanted("Gradient norm", "L2, before clipping", "ppo/grad_norm"),
            _Wanted("Approximate KL of the updates", "nats per token", "ppo/policy/approxkl"),
        ),
    ),
    (
        "agreement",
        "Trainer and policy server",
        (
            _Wanted("Log-probability gap, mean", "nats per token", "rollout/logprob_gap_mean"),
            _Wanted("Log-probability gap, largest", "nats per token", "rollout/logprob_gap_max"),
            _Wanted("Staleness, mean", "versions", "rollout/staleness_mean"),
            _Wanted("Staleness, largest", "versions", "rollout/staleness_max"),
            _Wanted("Clipped importance weights", "share of tokens", "ppo/policy/importance_clipped"),
        ),
    ),
)


def sections(runs: Sequence[Run]) -> list[Section]:
    """Everything that at least one of the one or two runs has numbers for."""
    made: list[tuple[str, str, list[Chart]]] = [
        (name, title, [_chart(runs, each) for each in wanted]) for name, title, wanted in _SECTIONS
    ]
    made[0][2].extend(_per_run(runs, "components", "Reward components", "", _components, note=_FEW))
    made.append(
        (
            "time",
            "Where the time went",
            [
                *_per_run(
                    runs,
                    "phases",
                    "Seconds by phase",
                    "seconds per step",
                    _phases,
                    note="A checkpoint counts to the step after it, an evaluation to the step before it.",
                    stacked=True,
                ),
                _chart(runs, _Wanted("Throughput", "completion tokens per second", "throughput/tokens_per_second")),
            ],
        )
    )
    made.append(("drops", "Dropped prompts", _per_run(runs, "dropped", "By reason", "prompts", _dropped, note=_FEW)))
    filled = [Section(name, title, [chart for chart in charts if chart.curves]) for name, title, charts in made]
    return [section for section in filled if section.charts]


def seconds_by_phase(run: Run) -> dict[str, float]:
    """Sums over the run; what a step's phases leave over is "other"."""
    sums = dict.fromkeys(PHASES, 0.0)
    other = 0.0
    for line in run.steps:
        parts = {phase: number(line, f"time/{phase}") or 0.0 for phase in PHASES if phase != "evaluate"}
        for phase, seconds in parts.items():
            sums[phase] += seconds
        whole = number(line, "time/step") or 0.0
        other += max(0.0, whole - sum(seconds for phase, seconds in parts.items() if phase != "checkpoint"))
    sums["evaluate"] = sum(number(line, "seconds") or 0.0 for line in run.evaluations)
    return {phase: seconds for phase, seconds in {**sums, "other": other}.items() if seconds > 0}


def _chart(runs: Sequence[Run], wanted: _Wanted) -> Chart:
    curves = []
    for place, run in enumerate(runs):
        prefix = f"{run.name}: " if len(runs) > 1 else ""
        trained = points(run.steps, wanted.trained)
        held_out = points(run.evaluations, wanted.held_out) if wanted.held_out else []
        curves += _curves(prefix + ("training" if wanted.held_out else wanted.title), trained, style=place)
        style = place if len(runs) > 1 else 1
        curves += _curves(f"{prefix}held out", held_out, style=style, held_out=True)
    return Chart(
        name=wanted.trained.replace("/", "-"),
        title=wanted.title,
        unit=wanted.unit,
        curves=curves,
        note=wanted.note,
        floor=wanted.floor,
        resumes=[run.resumed_after() for run in runs],
    )


def _curves(label: str, whole: Points, *, style: int, held_out: bool = False) -> list[Curve]:
    if all(value is None for _, value in whole):
        return []
    return [Curve(label, envelope(whole, most=MOST_POINTS), style, held_out)]


def _per_run(
    runs: Sequence[Run],
    name: str,
    title: str,
    unit: str,
    curves_of: Callable[[Run], list[Curve]],
    *,
    note: str = "",
    stacked: bool = False,
) -> list[Chart]:
    """A chart for each run: curves of several kinds in one would be told apart by nobody."""
    return [
        Chart(
            name=f"{name}-{place}",
            title=f"{title}: {run.name}" if len(runs) > 1 else title,
            unit=unit,
            curves=curves_of(run),
            note=note,
            stacked=stacked,
            resumes=[run.resumed_after()],
        )
        for place, run in enumerate(runs)
    ]


def _components(run: Run) -> list[Curve]:
    named = Counter(name for line in run.steps for name in line if name.startswith(_COMPONENT))
    return [
        curve
        for style, (name, _) in enumerate(named.most_common(_MOST_CURVES))
        for curve in _curves(name.removeprefix(_COMPONENT), points(run.steps, name), style=style)
    ]


def _dropped(run: Run) -> list[Curve]:
    named = Counter(name for line in run.steps for name in line if name.startswith(_DROPPED))
    return [
        # A step without such a drop does not name it.
        curve
        for style, (name, _) in enumerate(named.most_common(_MOST_CURVES))
        for curve in _curves(
            name.removeprefix(_DROPPED), [(line["step"], number(line, name) or 0.0) for line in run.steps], style=style
        )
    ]


def _phases(run: Run) -> list[Curve]:
    """Means over stretches of steps, since of stacked curves the lowest and highest say nothing."""
    evaluated = {line["step"]: number(line, "seconds") or 0.0 for line in run.evaluations}
    spent = seconds_by_phase(run)
    phases = [phase for phase in PHASES if phase in spent]
    curves = {phase: Points() for phase in phases}
    for start, end in stretches(len(run.steps), MOST_POINTS):
        for phase in phases:
            seconds = [
                evaluated.get(line["step"], 0.0) if phase == "evaluate" else number(line, f"time/{phase}") or 0.0
                for line in run.steps[start:end]
            ]
            curves[phase].append((run.steps[start]["step"], statistics.fmean(seconds)))
    return [Curve(phase, curves[phase], style) for style, phase in enumerate(phases) if curves[phase]]
