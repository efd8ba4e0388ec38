"""Truncated importance weights, and what they do to the loss."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.trainer.ppo.strategies import masked
from trainer.ppo.importance import IMPORTANCE_CAP, truncated_importance_weights
from trainer.ppo.losses import policy_loss
from trainer.ppo.masked import masked_mean
from trainer.ppo.statistics import importance_statistics, staleness_statistics

LOGPROBS = st.floats(-200, 0, width=32)


@given(pairs=st.lists(st.tuples(LOGPROBS, LOGPROBS), min_size=1, max_size=20), cap=st.floats(0.5, 10))
def test_a_weight_is_the_ratio_of_new_to_old_probability_up_to_the_cap(
    pairs: list[tuple[float, float]], cap: float
) -> None:
    old, rollout = (torch.tensor([values], requires_grad=True) for values in zip(*pairs, strict=True))

    weights = truncated_importance_weights(old, rollout, cap=cap)

    assert weights.tolist()[0] == pytest.approx([min(math.exp(old - new), cap) for old, new in pairs], rel=1e-4)
    assert not weights.requires_grad


@given(masked(tensors=4))
def test_the_loss_is_the_weighted_mean_of_the_tokens_losses(tensors: tuple[Tensor, ...]) -> None:
    logprobs, old, advantages, rollout, mask = tensors
    weights = truncated_importance_weights(old, rollout, cap=IMPORTANCE_CAP)

    weighted = policy_loss(logprobs, old, advantages, mask, cliprange=0.2, weights=weights)

    ratio = ((logprobs - old) * mask).exp()
    by_hand = weights * torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
    torch.testing.assert_close(weighted.loss, masked_mean(by_hand, mask))


def test_the_statistics_count_tokens_within_the_mask() -> None:
    weights, mask = torch.tensor([[2.0, 0.5, 2.0, 9.0]]), torch.tensor([[1.0, 1.0, 1.0, 0.0]])

    statistics = importance_statistics(weights, mask, cap=2.0)

    assert statistics["ppo/policy/importance_weight_mean"] == 1.5
    assert statistics["ppo/policy/importance_clipped"] == pytest.approx(2 / 3)


def test_staleness_is_told_by_mean_and_maximum() -> None:
    statistics = staleness_statistics(torch.tensor([0, 1, 3, 0]))

    assert statistics == {"rollout/staleness_mean": 1.0, "rollout/staleness_max": 3.0}
