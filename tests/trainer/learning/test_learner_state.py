from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.models import make_tiny_gpt2
from tests.trainer.learning.support import PAD, load, make_batch, parameters, same
from trainer.learning.learner import PPOLearner
from trainer.ppo.config import PPOConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_gpt2(tmp_path_factory.mktemp("model"))


def make(folder: Path, *, scheduled: bool = True) -> PPOLearner:
    model = load(folder)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    return PPOLearner(
        model,
        PPOConfig(
            batch_size=8,
            mini_batch_size=2,
            use_score_scaling=True,
            use_score_norm=True,
            target=1.0,
            horizon=100.0,
        ),
        reference=load(folder),
        tokenizer_pad_id=PAD,
        optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9) if scheduled else None,
    )


def test_a_restored_learner_continues_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    uninterrupted = make(folder)
    uninterrupted.step(make_batch(seed=1))
    torch.save({"model": parameters(uninterrupted), "learner": uninterrupted.state_dict()}, tmp_path / "saved.pt")
    statistics = [uninterrupted.step(make_batch(seed=seed)) for seed in (2, 3)]

    saved: dict[str, Any] = torch.load(tmp_path / "saved.pt", weights_only=True)
    resumed = make(folder)
    resumed.model.load_state_dict(saved["model"], strict=False)
    resumed.load_state_dict(saved["learner"])
    assert resumed.completed_steps == 1
    again = [resumed.step(make_batch(seed=seed)) for seed in (2, 3)]

    assert same(parameters(resumed), parameters(uninterrupted))
    assert resumed.kl_coefficient == uninterrupted.kl_coefficient
    for first, second in zip(statistics, again, strict=True):
        for name, value in first.items():
            if isinstance(value, float) and not name.startswith("time/"):
                assert second[name] == value, name


def test_a_learner_without_the_saved_state_goes_elsewhere(folder: Path) -> None:
    uninterrupted, fresh = make(folder), make(folder)
    uninterrupted.step(make_batch(seed=1))
    fresh.model.load_state_dict(parameters(uninterrupted), strict=False)
    for learner in (uninterrupted, fresh):
        learner.step(make_batch(seed=2))
    assert not same(parameters(fresh), parameters(uninterrupted))


def test_a_state_with_a_scheduler_needs_one(folder: Path) -> None:
    with pytest.raises(ValueError, match="lr_scheduler"):
        make(folder, scheduled=False).load_state_dict(make(folder).state_dict())
