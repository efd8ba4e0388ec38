"""The settings of PPO: TRL 0.11.4's names and defaults."""

from __future__ import annotations

import math
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from trainer.ppo.kl import KlPenalty

_TRACKING_ONLY = "TRL only prints it in its logs; leave it out"
_SET_BY_US = "it follows from the other fields; leave it out"
_NO_MEANING_HERE = {
    "exp_name": _TRACKING_ONLY,
    "task_name": _TRACKING_ONLY,
    "model_name": _TRACKING_ONLY,
    "query_dataset": _TRACKING_ONLY,
    "reward_model": _TRACKING_ONLY,
    "log_with": "log the statistics that step() returns, or run python -m trainer, which writes them itself",
    "tracker_kwargs": "log the statistics that step() returns yourself",
    "tracker_project_name": "log the statistics that step() returns yourself",
    "project_kwargs": "log the statistics that step() returns yourself",
    "accelerator_kwargs": "build the accelerate.Accelerator yourself and hand it over",
    "push_to_hub_if_best_kwargs": "call push_to_hub yourself",
    "compare_steps": "it only serves push_to_hub_if_best_kwargs; call push_to_hub yourself",
    "remove_unused_columns": "no column is ever removed; leave it out",
    "dataset_num_proc": "preprocess the data set before the run",
    "forward_batch_size": "use mini_batch_size",
    "optimize_cuda_cache": "no cache is emptied between forwards; leave it out",
    "optimize_device_cache": "no cache is emptied between forwards; leave it out",
    "is_encoder_decoder": "only causal models are trained; leave it out",
    "is_peft_model": "the model tells by itself; leave it out",
    "world_size": _SET_BY_US,
    "backward_batch_size": _SET_BY_US,
    "global_backward_batch_size": _SET_BY_US,
    "global_batch_size": _SET_BY_US,
}


def _unit(name: str) -> dict[str, Any]:
    return {"unit": name}


class PPOConfig(BaseModel):
    """What one PPO step does; names and defaults are TRL 0.11.4's.

    Raises pydantic.ValidationError (a ValueError) for a value out of range, for batch sizes that do not divide, and for
    names it does not know; TRL's names without a meaning here are refused with the reason.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    seed: int = Field(
        0,
        ge=0,
        lt=2**32,
        description="Seed of the shuffles (and of the sampling, in the loop)",
        json_schema_extra=_unit("number"),
    )
    steps: int = Field(
        20_000, ge=1, description="Length of the run, as TRL counts it", json_schema_extra=_unit("samples")
    )
    learning_rate: float = Field(
        1.41e-5, gt=0, description="Adam's learning rate", json_schema_extra=_unit("step size")
    )
    adap_kl_ctrl: bool = Field(True, description="Adapt the KL coefficient to hold the KL near its target")
    init_kl_coef: float = Field(
        0.2, ge=0, description="KL coefficient at the start", json_schema_extra=_unit("reward per nat")
    )
    kl_penalty: KlPenalty = Field(
        KlPenalty.KL,
        description="KL estimate per token: kl (k1), abs, mse (k2), k3, or full (over the whole vocabulary)",
    )
    target: float = Field(
        6.0, gt=0, description="KL per sample that the adaptive coefficient aims at", json_schema_extra=_unit("nats")
    )
    horizon: float = Field(
        10_000.0, gt=0, description="How slowly the KL coefficient adapts", json_schema_extra=_unit("samples")
    )
    gamma: float = Field(1.0, ge=0, le=1, description="Discount per token", json_schema_extra=_unit("ratio"))
    lam: float = Field(
        0.95, ge=0, le=1, description="Lambda of the advantage estimate (GAE)", json_schema_extra=_unit("ratio")
    )
    cliprange: float = Field(
        0.2, gt=0, description="Clip of the policy's probability ratio: 1 ± cliprange", json_schema_extra=_unit("ratio")
    )
    cliprange_value: float = Field(
        0.2,
        gt=0,
        description="Clip of the value's change: old value ± cliprange_value",
        json_schema_extra=_unit("value"),
    )
    vf_coef: float = Field(0.1, ge=0, description="Weight of the value loss", json_schema_extra=_unit("coefficient"))
    batch_size: int = Field(128, ge=1, description="Completions per PPO step", json_schema_extra=_unit("samples"))
    mini_batch_size: int | None = Field(
        None,
        ge=1,
        description="Completions per forward and backward; unset: the smaller of 128 and batch_size",
        json_schema_extra=_unit("samples"),
    )
    gradient_accumulation_steps: int = Field(
        1, ge=1, description="Mini-batches per optimizer update", json_schema_extra=_unit("mini-batches")
    )
    ppo_epochs: int = Field(
        4, ge=1, description="Passes over the batch per PPO step", json_schema_extra=_unit("passes")
    )
    max_grad_norm: float | None = Field(
        None,
        gt=0,
        description="Clip of the gradient's norm at every update; unset: off",
        json_schema_extra=_unit("L2 norm"),
    )
    early_stopping: bool = Field(
        False, description="Skip the remaining epochs once the policy's KL exceeds 1.5 target_kl"
    )
    target_kl: float = Field(1.0, gt=0, description="See early_stopping", json_schema_extra=_unit("nats per token"))
    ratio_threshold: float = Field(
        10.0,
        gt=0,
        description="A mini-batch whose mean probability ratio exceeds this gets a loss of zero",
        json_schema_extra=_unit("ratio"),
    )
    use_score_scaling: bool = Field(False, description="Divide scores by their running standard deviation")
    use_score_norm: bool = Field(False, description="Subtract the running mean too; needs use_score_scaling")
    score_clip: float | None = Field(
        None, gt=0, description="Clip scores to ± this, after scaling; unset: off", json_schema_extra=_unit("reward")
    )
    whiten_rewards: bool = Field(False, description="Scale token rewards to unit variance, keeping their mean")
    gradient_checkpointing: bool = Field(False, description="Recompute activations in the backward pass to save memory")

    @model_validator(mode="before")
    @classmethod
    def _explain_names_without_meaning(cls, values: Any) -> Any:
        if isinstance(values, dict) and (known := [name for name in values if name in _NO_MEANING_HERE]):
            raise ValueError("; ".join(f"{name} has no meaning here: {_NO_MEANING_HERE[name]}" for name in known))
        return values

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.mini_batch_size is None:
            self.mini_batch_size = min(128, self.batch_size)
        if self.batch_size % self.backward_batch_size != 0:
            raise ValueError(
                f"batch_size ({self.batch_size}) must be a multiple of mini_batch_size * gradient_accumulation_steps "
                f"({self.mini_batch_size} * {self.gradient_accumulation_steps} = {self.backward_batch_size})"
            )
        if self.use_score_norm and not self.use_score_scaling:
            raise ValueError(
                "use_score_norm needs use_score_scaling: TRL ignores it without a word, here it is an error"
            )
        return self

    @property
    def samples_per_mini_batch(self) -> int:
        """`mini_batch_size`, never None."""
        assert self.mini_batch_size is not None
        return self.mini_batch_size

    @property
    def backward_batch_size(self) -> int:
        """Samples per optimizer update."""
        return self.samples_per_mini_batch * self.gradient_accumulation_steps

    @property
    def total_ppo_epochs(self) -> int:
        """PPO steps of a run of `steps` samples, under TRL's name."""
        return math.ceil(self.steps / self.batch_size)
