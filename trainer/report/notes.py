"""What in a run's numbers deserves a second look, in words.

Each rule is a function of the run that returns a sentence or two, or None. They point at what is often, not always, a
sign of trouble, so each says what was seen and only then what it may mean.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from trainer.report.reading import Line, Run, best_step, points

Rule = Callable[[Run], str | None]

_NOISE_NATS = 0.1
"""A KL estimate this far below zero is more than the noise of a usual batch."""
_GAP_NATS = 0.05
"""Between two dtypes of the same weights the mean gap is about a fifth of this."""
_ENOUGH_STEPS = 4


def notes(run: Run) -> list[str]:
    """Every rule's sentence that applies to the run."""
    return [note for rule in RULES if (note := rule(run)) is not None]


def negative_kl(run: Run) -> str | None:
    """The KL estimate is often clearly negative."""
    values = _numbers(run.steps, "objective/kl")
    negative = [value for value in values if value < -_NOISE_NATS]
    if len(negative) < max(3, len(values) / 10):
        return None
    return (
        f"The KL estimate is negative in {len(negative)} of {len(values)} steps (lowest {min(negative):.2f} nats per "
        "completion). Small batches scatter around zero at first; when it lasts, sampling settings and "
        "log-probabilities may disagree: what is sampled is then not the distribution that is scored."
    )


def high_kl(run: Run) -> str | None:
    """The KL is far above what the adaptive coefficient aims at."""
    target, values = run.number("target"), _numbers(run.steps, "objective/kl")
    if not run.settings.get("adap_kl_ctrl") or target is None or len(values) < _ENOUGH_STEPS:
        return None
    late = statistics.fmean(_last_quarter(values))
    if late <= 2 * target:
        return None
    return (
        f"KL is {late:.1f} nats per completion in the last quarter of the steps, the controller's target {target:g}. "
        "Its coefficient moves slowly (horizon); a higher init_kl_coef holds the policy nearer to the reference."
    )


def few_distinct(run: Run) -> str | None:
    """Many completions are equal at the end and were not at the start."""
    values = _held_out_or_trained(run, "distinct_fraction")
    if len(values) < 2 or values[-1] >= 0.5 or values[0] < 0.5:
        return None
    return (
        f"Distinct completions fell below 50 %: from {values[0]:.0%} to {values[-1]:.0%}. The policy may have "
        "found one phrase that the reward likes; read the samples."
    )


def reward_with_length(run: Run) -> str | None:
    """Reward rose while the completions' length halved or doubled."""
    rewards, lengths = _held_out_or_trained(run, "reward_mean"), _held_out_or_trained(run, "length_mean")
    if len(rewards) < 2 or len(lengths) < 2 or rewards[-1] <= rewards[0] or min(lengths[0], lengths[-1]) <= 0:
        return None
    ratio = lengths[-1] / lengths[0]
    if 0.5 < ratio < 2:
        return None
    change = "fell" if ratio < 1 else "grew"
    return (
        f"Reward rose from {rewards[0]:.3g} to {rewards[-1]:.3g} while the mean length {change} from "
        f"{lengths[0]:.1f} to {lengths[-1]:.1f} tokens. The reward may follow length more than content."
    )


def past_its_best(run: Run) -> str | None:
    """The held-out reward has lost much of what it had gained."""
    rewards, best = _numbers(run.evaluations, "reward_mean"), best_step(run.evaluations)
    if len(rewards) < 3 or best is None:
        return None
    gained, lost = max(rewards) - rewards[0], max(rewards) - rewards[-1]
    if gained <= 0 or lost < gained / 4:
        return None
    return (
        f"The held-out reward was best at step {best} ({max(rewards):.3g}) and is {rewards[-1]:.3g} at the last "
        "evaluation. The model in best/ may be the better one."
    )


def logprob_gap(run: Run) -> str | None:
    """Trainer and policy server disagree about log-probabilities."""
    values = _numbers(run.steps, "rollout/logprob_gap_mean")
    if not values or max(values) <= _GAP_NATS:
        return None
    return (
        f"The trainer's log-probabilities differ from the policy server's by up to {max(values):.2g} nats per token (a "
        "step's mean). Different dtypes or kernels explain about 0.01; more points at different weights or settings."
    )


def skipped_minibatches(run: Run) -> str | None:
    """Mini-batches were skipped for their ratio."""
    values = _numbers(run.steps, "ppo/policy/skipped")
    steps = sum(value > 0 for value in values)
    if not steps:
        return None
    return (
        f"In {steps} of {len(values)} steps mini-batches were skipped because their mean probability ratio exceeded "
        "ratio_threshold: the updates moved the policy far. A lower learning_rate or fewer ppo_epochs move it less."
    )


def blind_value_head(run: Run) -> str | None:
    """The value head explains nothing of the returns, late in the run."""
    values = _numbers(run.steps, "ppo/val/var_explained")
    if len(values) < _ENOUGH_STEPS or max(_last_quarter(values)) > 0:
        return None
    return (
        "Explained variance stayed at or below 0 in the last quarter of the steps: the value head predicts returns no "
        "better than their mean would, and advantages are noisier for it."
    )


def lost_entropy(run: Run) -> str | None:
    """The policy's entropy has nearly vanished."""
    values = _numbers(run.steps, "ppo/policy/entropy")
    if len(values) < _ENOUGH_STEPS or values[0] <= 0 or values[-1] > values[0] / 4:
        return None
    return (
        f"Entropy fell from {values[0]:.2f} to {values[-1]:.2f} nats per token: the policy hardly explores any "
        "more, and what it has not found by now it is unlikely to find."
    )


def cut_by_length(run: Run) -> str | None:
    """Most held-out completions of the last evaluation hit max_new_tokens."""
    last = max((sample.step for sample in run.samples if sample.kind == "evaluation"), default=None)
    reasons = [sample.finish_reason for sample in run.samples if (sample.kind, sample.step) == ("evaluation", last)]
    cut = reasons.count("length")
    if cut * 2 <= len(reasons):
        return None
    return (
        f"{cut} of {len(reasons)} held-out completions of step {last} were cut by max_new_tokens, so the reward judged "
        "texts without an end."
    )


def many_drops(run: Run) -> str | None:
    """More than a twentieth of the prompts was dropped."""
    dropped = sum(_numbers(run.steps, "samples/dropped"))
    drawn = dropped + sum(_numbers(run.steps, "samples/trained"))
    if not drawn or dropped / drawn <= 0.05:
        return None
    mostly = f", mostly {run.drops[0].reason} {run.drops[0].code}".rstrip() if run.drops else ""
    return (
        f"{dropped / drawn:.0%} of the prompts drawn were dropped{mostly}. What was trained on may be a biased choice."
    )


def steps_without_update(run: Run) -> str | None:
    """Steps in which nothing could be trained on."""
    empty = sum(line.get("samples/trained") == 0 for line in run.steps)
    return f"{empty} of {len(run.steps)} steps had no sample to train on and changed nothing." if empty else None


RULES: Sequence[Rule] = (
    negative_kl,
    high_kl,
    few_distinct,
    reward_with_length,
    past_its_best,
    logprob_gap,
    skipped_minibatches,
    blind_value_head,
    lost_entropy,
    cut_by_length,
    many_drops,
    steps_without_update,
)


def _numbers(lines: Sequence[Line], name: str) -> list[float]:
    return [value for _, value in points(lines, name) if value is not None]


def _held_out_or_trained(run: Run, name: str) -> list[float]:
    """Of the evaluations, or of the training steps when there are fewer than two evaluations."""
    held_out = _numbers(run.evaluations, name)
    if len(held_out) >= 2:
        return held_out
    return _numbers(run.steps, name if name == "reward_mean" else f"rollout/{name}")


def _last_quarter(values: Sequence[float]) -> Sequence[float]:
    return values[-max(1, len(values) // 4) :]
