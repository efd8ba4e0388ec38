from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.trainer.ppo.strategies import masked
from trainer.ppo.kl import KlPenalty, estimated_kl, full_kl

logits = st.lists(st.floats(-5, 5, width=32), min_size=6, max_size=6).map(
    lambda numbers: torch.log_softmax(torch.tensor(numbers, dtype=torch.float64), -1)
)


@given(masked(tensors=2))
def test_the_estimators_are_what_they_are_called(tensors: tuple[Tensor, ...]) -> None:
    logprobs, reference, _ = tensors
    difference = logprobs - reference
    assert torch.equal(estimated_kl(logprobs, reference, KlPenalty.KL), difference)
    assert torch.equal(estimated_kl(logprobs, reference, KlPenalty.ABS), difference.abs())
    torch.testing.assert_close(estimated_kl(logprobs, reference, KlPenalty.MSE), difference**2 / 2)
    k3 = torch.exp(-difference) - 1 + difference
    torch.testing.assert_close(estimated_kl(logprobs, reference, KlPenalty.K3), k3)


@given(masked(tensors=2), st.sampled_from([torch.float32, torch.float64]), st.sampled_from([1.0, 1e-3, 1e-6]))
def test_k3_is_never_negative(tensors: tuple[Tensor, ...], dtype: torch.dtype, apart: float) -> None:
    logprobs, reference = (tensor.to(dtype) * apart for tensor in tensors[:2])
    assert (estimated_kl(logprobs, reference, KlPenalty.K3) >= 0).all()


@given(logits, logits)
def test_the_full_kl_is_the_expectation_of_the_unbiased_estimates_and_never_negative(
    policy: Tensor, reference: Tensor
) -> None:
    for penalty in (KlPenalty.KL, KlPenalty.K3):
        expectation = (policy.exp() * estimated_kl(policy, reference, penalty)).sum()
        torch.testing.assert_close(full_kl(policy, reference), expectation)
    assert full_kl(policy, reference) >= -1e-12
    torch.testing.assert_close(
        full_kl(policy, reference), torch.nn.functional.kl_div(reference, policy, log_target=True, reduction="sum")
    )


@given(logits)
def test_a_policy_has_no_kl_from_itself(policy: Tensor) -> None:
    assert full_kl(policy, policy) == 0
    for penalty in (KlPenalty.KL, KlPenalty.ABS, KlPenalty.MSE, KlPenalty.K3):
        assert (estimated_kl(policy, policy, penalty) == 0).all()


def test_a_token_that_the_policy_never_takes_adds_nothing() -> None:
    policy = torch.tensor([0.5, 0.5, 0.0]).log()
    reference = torch.tensor([0.25, 0.25, 0.5]).log()
    assert full_kl(policy, reference).item() == pytest.approx(torch.tensor(2.0).log().item())


def test_full_is_not_an_estimate_from_tokens() -> None:
    with pytest.raises(ValueError, match="whole distributions"):
        estimated_kl(torch.zeros(1), torch.zeros(1), KlPenalty.FULL)
