"""A learner on a tiny model, and batches for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.learning.batch import RolloutBatch
from trainer.learning.learner import PPOLearner
from trainer.model import AutoModelForCausalLMWithValueHead
from trainer.ppo.config import PPOConfig

PAD = 256


def make_learner(
    folder: Path, *, reference: bool = True, settings: dict[str, Any] | None = None, **rest: Any
) -> PPOLearner:
    """A learner of the model in `folder` (the same value head each time) with 8 samples per step, 4 per mini-batch."""
    return PPOLearner(
        load(folder),
        PPOConfig(**{"batch_size": 8, "mini_batch_size": 4, "learning_rate": 1e-4, **(settings or {})}),
        reference=load(folder) if reference else None,
        tokenizer_pad_id=PAD,
        **rest,
    )


def load(folder: Path) -> AutoModelForCausalLMWithValueHead:
    torch.manual_seed(3)
    return AutoModelForCausalLMWithValueHead.from_pretrained(folder, v_head_init_strategy="normal")


def make_batch(rows: int = 8, *, seed: int = 0, **fields: Any) -> RolloutBatch:
    """Random tokens: prompts of 1 to 5 and responses of 1 to 7 tokens."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(most: int) -> Tensor:
        length = int(torch.randint(1, most + 1, (1,), generator=generator))
        return torch.randint(0, 256, (length,), generator=generator)

    return RolloutBatch(
        **{
            "queries": [tokens(5) for _ in range(rows)],
            "responses": [tokens(7) for _ in range(rows)],
            "scores": torch.randn(rows, generator=generator),
            **fields,
        }
    )


def parameters(learner: PPOLearner) -> dict[str, Tensor]:
    """A copy of every trained number, the value head's too."""
    return {name: parameter.detach().clone() for name, parameter in learner.model.named_parameters()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
