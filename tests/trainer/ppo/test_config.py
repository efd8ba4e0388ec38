from __future__ import annotations

import pytest
from pydantic import ValidationError

from trainer.ppo.config import PPOConfig
from trainer.ppo.kl import KlPenalty

# From TRL 0.11.4's PPOConfig, every field that has a meaning here, but for mini_batch_size (128 there).
DEFAULTS_OF_TRL = {
    "seed": 0,
    "steps": 20000,
    "learning_rate": 1.41e-5,
    "adap_kl_ctrl": True,
    "init_kl_coef": 0.2,
    "kl_penalty": "kl",
    "target": 6.0,
    "horizon": 10000.0,
    "gamma": 1.0,
    "lam": 0.95,
    "cliprange": 0.2,
    "cliprange_value": 0.2,
    "vf_coef": 0.1,
    "batch_size": 128,
    "gradient_accumulation_steps": 1,
    "ppo_epochs": 4,
    "max_grad_norm": None,
    "early_stopping": False,
    "target_kl": 1.0,
    "ratio_threshold": 10.0,
    "use_score_scaling": False,
    "use_score_norm": False,
    "score_clip": None,
    "whiten_rewards": False,
    "gradient_checkpointing": False,
}


def test_names_and_defaults_are_those_of_trl() -> None:
    assert PPOConfig().model_dump(exclude={"mini_batch_size"}) == DEFAULTS_OF_TRL


@pytest.mark.parametrize(("batch_size", "mini_batch_size"), [(1, 1), (16, 16), (128, 128), (256, 128)])
def test_a_mini_batch_size_that_is_not_given_never_exceeds_the_batch_size(
    batch_size: int, mini_batch_size: int
) -> None:
    assert PPOConfig(batch_size=batch_size).samples_per_mini_batch == mini_batch_size


def test_batch_sizes_that_do_not_divide_are_refused_with_their_numbers() -> None:
    with pytest.raises(ValidationError, match=r"batch_size \(16\) must be a multiple .* \(4 \* 3 = 12\)"):
        PPOConfig(batch_size=16, mini_batch_size=4, gradient_accumulation_steps=3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("gamma", 1.5),
        ("lam", -0.1),
        ("target", 0.0),
        ("horizon", 0.0),
        ("batch_size", 0),
        ("ppo_epochs", 0),
        ("kl_penalty", "k4"),
        ("seed", -1),
        ("score_clip", 0.0),
        ("max_grad_norm", -1.0),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ValidationError, match=name):
        PPOConfig(**{name: value})


@pytest.mark.parametrize("name", ["log_with", "model_name", "forward_batch_size", "is_peft_model"])
def test_names_of_trl_without_a_meaning_here_are_refused_with_the_reason(name: str) -> None:
    with pytest.raises(ValidationError, match=f"{name} has no meaning here: "):
        PPOConfig(**{name: None})


@pytest.mark.parametrize(("name", "meant"), [("k1", KlPenalty.KL), ("k2", KlPenalty.MSE), ("k3", KlPenalty.K3)])
def test_the_kl_estimators_have_schulmans_names_too(name: str, meant: KlPenalty) -> None:
    assert PPOConfig(**{"kl_penalty": name}).kl_penalty is meant


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValidationError, match="learning_rat"):
        PPOConfig(**{"learning_rat": 1e-5})


def test_score_norm_without_scaling_would_do_nothing_and_is_refused() -> None:
    with pytest.raises(ValidationError, match="use_score_norm needs use_score_scaling"):
        PPOConfig(use_score_norm=True)


def test_every_field_is_described() -> None:
    assert all(field.description for field in PPOConfig.model_fields.values())


def test_derived_sizes_follow_trl() -> None:
    config = PPOConfig(batch_size=64, mini_batch_size=8, gradient_accumulation_steps=4, steps=1000)
    assert (config.backward_batch_size, config.total_ppo_epochs) == (32, 16)
    assert config.kl_penalty is KlPenalty.KL
