"""What the policy wrote, arranged to be compared: the same prompt at several steps, the same step in two runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.report.reading import Line, Run, Sample, best_step
from trainer.report.thinning import spread

MOST_EVALUATIONS = 11
MOST_TRAINING_STEPS = 30
MOST_PROMPTS = 24
MOST_PER_STEP = 6
_MOST_CHARACTERS = 1200


def choose_steps(runs: Sequence[Run]) -> dict[str, set[int]]:
    """The steps whose samples are shown, by kind: spread over what the runs share, and each one's last and best."""
    evaluations = _spread_over([run.evaluations for run in runs], most=MOST_EVALUATIONS)
    best = {step for run in runs if (step := best_step(run.evaluations)) is not None}
    return {
        "evaluation": evaluations | best,
        "step": _spread_over([run.steps for run in runs], most=MOST_TRAINING_STEPS),
    }


def _spread_over(lines_of_runs: Sequence[Sequence[Line]], *, most: int) -> set[int]:
    steps_of_runs = [[line["step"] for line in lines] for lines in lines_of_runs if lines]
    shared = set[int].intersection(*map(set, steps_of_runs)) if steps_of_runs else set()
    return set(spread(sorted(shared), most=most)) | {steps[-1] for steps in steps_of_runs}


@dataclass(frozen=True)
class HeldOutPrompt:
    """`rows`: (step, the sample of each run or None where it has none)."""

    prompt: str
    rows: Sequence[tuple[int, Sequence[Sample | None]]]


@dataclass(frozen=True)
class TrainingStep:
    """`by_run`: the samples kept of this step, for each run."""

    step: int
    by_run: Sequence[Sequence[Sample]]


def held_out_prompts(runs: Sequence[Run]) -> list[HeldOutPrompt]:
    """The first held-out prompts with their completions over the evaluations; the same prompt of two runs is one."""
    found = [
        {(sample.row, sample.prompt, sample.step): sample for sample in run.samples if sample.kind == "evaluation"}
        for run in runs
    ]
    prompts = list(dict.fromkeys((row, prompt) for of_run in found for row, prompt, _ in of_run))[:MOST_PROMPTS]
    steps = sorted({step for of_run in found for *_, step in of_run})
    arranged = []
    for row, prompt in prompts:
        rows = [(step, [of_run.get((row, prompt, step)) for of_run in found]) for step in steps]
        arranged.append(HeldOutPrompt(prompt, [(step, samples) for step, samples in rows if any(samples)]))
    return arranged


def training_steps(runs: Sequence[Run]) -> list[TrainingStep]:
    """The samples kept of training steps, in the order of steps."""
    by_step: dict[int, list[list[Sample]]] = {}
    for place, run in enumerate(runs):
        for sample in run.samples:
            if sample.kind == "step":
                of_step = by_step.setdefault(sample.step, [[] for _ in runs])[place]
                if len(of_step) < MOST_PER_STEP:
                    of_step.append(sample)
    return [TrainingStep(step, by_step[step]) for step in sorted(by_step)]


def shortened(text: str) -> str:
    """The text, or as much of its beginning as a page bears, saying how much is missing."""
    if len(text) <= _MOST_CHARACTERS:
        return text
    return f"{text[:_MOST_CHARACTERS]} … [{len(text) - _MOST_CHARACTERS:,} more characters]"
