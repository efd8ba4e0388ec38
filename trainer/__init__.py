"""The trainer: owns the policy weights and runs PPO over gRPC."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.model import AutoModelForCausalLMWithValueHead
    from trainer.ppo.config import PPOConfig
    from trainer.quickstart.ppo_trainer import PPOTrainer

__all__ = ["AutoModelForCausalLMWithValueHead", "PPOConfig", "PPOTrainer"]

_HOMES = {
    "AutoModelForCausalLMWithValueHead": "trainer.model",
    "PPOConfig": "trainer.ppo.config",
    "PPOTrainer": "trainer.quickstart.ppo_trainer",
}


def __getattr__(name: str) -> Any:
    """Import on first use: `--help` of the trainer must not wait for torch and transformers."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
