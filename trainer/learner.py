"""One PPO step on one batch of rollouts: the only place where the policy's weights change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trainer.batch import RolloutBatch
from trainer.model import AutoModelForCausalLMWithValueHead
from trainer.ppo.config import PPOConfig

Statistics = dict[str, "float | Tensor | list[Tensor]"]


class NonFiniteLossError(RuntimeError):
    """A loss or gradient is NaN or infinite. The update was not made; earlier updates of this step were.

    `statistics` are those of the offending mini-batch.
    """

    def __init__(self, message: str, statistics: dict[str, float]) -> None:
        super().__init__(message)
        self.statistics = statistics


class PPOLearner:
    """Updates a policy and its value head from batches of rollouts, as TRL 0.11.4's `PPOTrainer.step` does.

    `docs/ppo.md` says what is computed and where it differs from TRL.
    """

    def __init__(
        self,
        model: AutoModelForCausalLMWithValueHead,
        config: PPOConfig,
        *,
        reference: nn.Module | None,
        tokenizer_pad_id: int,
        temperature: float = 1.0,
        old_logprobs: Literal["trainer", "rollout"] = "trainer",
        accelerator: Any | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    ) -> None:
        raise NotImplementedError

    def step(self, batch: RolloutBatch) -> Statistics:
        """Train on `batch` and return the statistics."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to continue exactly, except the model's weights."""
        raise NotImplementedError

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        raise NotImplementedError

    def policy_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """The causal LM's parameters under transformers' names, tied ones once."""
        raise NotImplementedError
