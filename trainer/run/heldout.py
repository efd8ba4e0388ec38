"""Held-out evaluation: the same prompts and seeds every time, at the training temperature."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trainer.clients.rewards import Scored
from trainer.learning.learner import PPOLearner
from trainer.run.rollouts import Rollout


@dataclass(frozen=True)
class HeldOutResult:
    """Means over the judged completions; None where nothing was judged (or, for `kl_mean`, no token was sampled)."""

    reward_mean: float | None
    reward_std: float | None
    kl_mean: float | None
    """Mean over completions of the sum over tokens of policy − reference log-probabilities, in nats."""
    distinct_fraction: float
    length_mean: float
    judged: int
    prompts: int


def summarize(rollouts: Sequence[Rollout], reference_logprobs: Sequence[Sequence[float] | None]) -> HeldOutResult:
    """Numbers of one evaluation; rows as in `rollouts`, a reference row is None for a completion without tokens."""
    rewards = [rollout.outcome.reward for rollout in rollouts if isinstance(rollout.outcome, Scored)]
    kls = [
        sum(rollout.generation.logprobs) - sum(reference)
        for rollout, reference in zip(rollouts, reference_logprobs, strict=True)
        if reference is not None
    ]
    return HeldOutResult(
        reward_mean=statistics.fmean(rewards) if rewards else None,
        reward_std=statistics.pstdev(rewards) if rewards else None,
        kl_mean=statistics.fmean(kls) if kls else None,
        distinct_fraction=len({rollout.generation.token_ids for rollout in rollouts}) / len(rollouts),
        length_mean=statistics.fmean(len(rollout.generation.token_ids) for rollout in rollouts),
        judged=len(rewards),
        prompts=len(rollouts),
    )


def logprobs_of(learner: PPOLearner, rollouts: Sequence[Rollout]) -> list[list[float] | None]:
    """The learner's reference's log-probabilities of each completion's tokens; None for one without tokens."""
    result: list[list[float] | None] = [None] * len(rollouts)
    sampled = [index for index, rollout in enumerate(rollouts) if rollout.generation.token_ids]
    queries = [torch.tensor(rollouts[index].prompt.token_ids) for index in sampled]
    responses = [torch.tensor(rollouts[index].generation.token_ids) for index in sampled]
    if sampled:
        for index, values in zip(sampled, learner.reference_logprobs(queries, responses), strict=True):
            result[index] = values.tolist()
    return result


def sample_line(kind: str, step: int, rollout: Rollout) -> dict[str, Any]:
    """What samples.jsonl keeps of one rollout; `reward` is None when it was not judged."""
    outcome = rollout.outcome
    return {
        "kind": kind,
        "step": step,
        "row": rollout.row,
        "prompt": rollout.prompt.text,
        "completion": rollout.generation.text,
        "reward": outcome.reward if isinstance(outcome, Scored) else None,
        "components": dict(outcome.components) if isinstance(outcome, Scored) else {},
        "tokens": len(rollout.generation.token_ids),
        "finish_reason": rollout.generation.finish_reason.value,
    }
