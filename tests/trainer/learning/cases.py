"""Steps that several processes must make as one does."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tests.trainer.learning.support import load, make_batch
from trainer.adapters import ADAPTER_OFF, add_adapter, lora_config
from trainer.learning.learner import PPOLearner
from trainer.ppo.config import PPOConfig

STEPS = 2


@dataclass(frozen=True)
class Case:
    """Settings of PPO, and of the learner; `rows` of each step's batch."""

    settings: dict[str, Any] = field(default_factory=dict)
    rows: tuple[int, int] = (8, 8)
    options: dict[str, Any] = field(default_factory=dict)
    rollout_off_by: float = 0.0
    model: str = "gpt2"
    adapter: bool = False


CASES = {
    "plain": Case(),
    "uneven batches": Case({"mini_batch_size": 4}, rows=(7, 5)),
    "one row per mini-batch": Case({"mini_batch_size": 1, "ppo_epochs": 1}, rows=(8, 1)),
    "accumulation": Case({"mini_batch_size": 2, "gradient_accumulation_steps": 2}, rows=(8, 7)),
    "a clipped gradient": Case({"max_grad_norm": 0.01}),
    "a skipped mini-batch": Case(
        {"ratio_threshold": 1.5}, options={"old_logprobs": "rollout"}, rollout_off_by=1.0, rows=(8, 3)
    ),
    "an early stop": Case({"early_stopping": True, "target_kl": 1e-6, "learning_rate": 1e-3}),
    "scaled scores": Case({"use_score_scaling": True, "use_score_norm": True, "score_clip": 1.0}, rows=(8, 5)),
    "whitened rewards": Case({"whiten_rewards": True, "horizon": 100.0, "target": 0.1}),
    "the full kl": Case({"kl_penalty": "full"}, rows=(7, 8)),
    "recomputed activations": Case({"gradient_checkpointing": True}),
    "an adapter": Case({"mini_batch_size": 4, "learning_rate": 1e-3}, rows=(7, 5), adapter=True),
    "an adapter and the full kl": Case({"kl_penalty": "full", "gradient_checkpointing": True}, adapter=True),
    "an adapter of llama": Case(model="llama", adapter=True),
    "llama": Case(model="llama"),
    "an architecture that is read padded": Case(model="neox"),
}


def step_through(case: Case, folder: Path, **rest: Any) -> tuple[PPOLearner, list[dict[str, Any]]]:
    """The learner after the case's steps, and the statistics of each."""
    torch.manual_seed(5)
    settings = {"batch_size": 8, "mini_batch_size": 4, "ppo_epochs": 2, "learning_rate": 1e-4, **case.settings}
    model = load(folder / case.model)
    if case.adapter:
        add_adapter(model.pretrained_model, lora_config(3, 6.0, None))
    learner = PPOLearner(
        model,
        PPOConfig(**settings),
        reference=ADAPTER_OFF if case.adapter else AutoModelForCausalLM.from_pretrained(folder / case.model),
        tokenizer_pad_id=256,
        **case.options,
        **rest,
    )
    statistics = []
    for step, rows in enumerate(case.rows):
        batch = make_batch(rows, seed=step)
        if case.rollout_off_by:
            rollout = [row - case.rollout_off_by for row in learner.logprobs(batch.queries, batch.responses)]
            batch = make_batch(rows, seed=step, rollout_logprobs=rollout)
        statistics.append(dict(learner.step(batch)))
    return learner, statistics
