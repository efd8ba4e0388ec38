from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.ppo.moments import RunningMoments, clip_scores, scale_scores

batches = st.lists(st.lists(st.floats(-100, 100, width=32), max_size=6), max_size=5)


@given(batches)
def test_running_moments_are_those_of_everything_seen(numbers: list[list[float]]) -> None:
    moments = RunningMoments()
    for batch in numbers:
        moments = moments.updated(torch.tensor(batch))
    everything = torch.tensor([number for batch in numbers for number in batch], dtype=torch.float64)
    assert moments.count == len(everything)
    if len(everything):
        assert moments.mean == pytest.approx(everything.mean().item(), abs=1e-9)
    if len(everything) > 1 and everything.std() > 1e-6:
        assert moments.std == pytest.approx(everything.std().item(), rel=1e-9)


@pytest.mark.parametrize("scores", [[], [3.0], [2.0, 2.0, 2.0]])
def test_an_undefined_or_zero_deviation_counts_as_1(scores: list[float]) -> None:
    assert RunningMoments().updated(torch.tensor(scores)).std == 1.0


def test_scores_are_scaled_by_moments_that_include_them() -> None:
    scores = torch.tensor([1.0, 3.0])
    moments = RunningMoments().updated(scores)
    assert moments.std == pytest.approx(math.sqrt(2))
    torch.testing.assert_close(
        scale_scores(scores, moments, subtract_mean=True), torch.tensor([-1.0, 1.0]) / math.sqrt(2)
    )
    torch.testing.assert_close(scale_scores(scores, moments, subtract_mean=False), scores / math.sqrt(2))


def test_clipping_keeps_scores_within_the_limit() -> None:
    assert clip_scores(torch.tensor([-2.0, 0.25, 9.0]), 0.5).tolist() == [-0.5, 0.25, 0.5]
