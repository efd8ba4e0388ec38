from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from torch import Tensor

from tests.trainer.ppo.strategies import masked
from trainer.ppo.masked import masked_mean, masked_variance, whiten


@given(masked())
def test_mean_and_variance_are_those_of_the_chosen_numbers(tensors: tuple[Tensor, ...]) -> None:
    values, mask = tensors
    chosen = values[mask.bool()]
    torch.testing.assert_close(masked_mean(values, mask), chosen.mean())
    if len(chosen) > 1:
        torch.testing.assert_close(masked_variance(values, mask), chosen.var())


def test_one_number_has_no_variance() -> None:
    assert math.isnan(masked_variance(torch.tensor([[3.0, 9.0]]), torch.tensor([[1.0, 0.0]])).item())


@given(masked())
def test_whitened_numbers_have_mean_0_and_variance_1(tensors: tuple[Tensor, ...]) -> None:
    values, mask = tensors
    assume(mask.sum() > 1)
    variance = masked_variance(values, mask)
    assume(variance > 1e-3)
    whitened = whiten(values, mask)
    assert masked_mean(whitened, mask).item() == pytest.approx(0.0, abs=1e-9)
    assert masked_variance(whitened, mask).item() == pytest.approx(1.0, abs=1e-4)
    assert (whitened[~mask.bool()] == 0).all()


@given(masked())
def test_whitening_without_shift_keeps_the_mean(tensors: tuple[Tensor, ...]) -> None:
    values, mask = tensors
    kept = whiten(values, mask, shift_mean=False)
    torch.testing.assert_close(masked_mean(kept, mask), masked_mean(values, mask))
    assert (kept[~mask.bool()] == 0).all()


def test_whitening_a_single_token_only_centres_it() -> None:
    values, mask = torch.tensor([[5.0, 7.0]]), torch.tensor([[1.0, 0.0]])
    assert whiten(values, mask).tolist() == [[0.0, 0.0]]
    assert whiten(values, mask, shift_mean=False).tolist() == [[5.0, 0.0]]


def test_whitening_equal_numbers_gives_zeros() -> None:
    assert whiten(torch.full((2, 3), 4.0), torch.ones(2, 3)).abs().max() == 0
