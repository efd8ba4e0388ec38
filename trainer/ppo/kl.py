"""How far the policy has moved from the reference, token by token, in nats."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the settings name KlPenalty, and --help must not wait for torch
    from torch import Tensor


class KlPenalty(StrEnum):
    """Which estimate of the KL divergence penalizes the rewards: TRL's names, and k1, k2, k3 of Schulman's."""

    KL = "kl"
    ABS = "abs"
    MSE = "mse"
    K3 = "k3"
    FULL = "full"

    @classmethod
    def _missing_(cls, value: object) -> KlPenalty | None:
        """k1 and k2 are other names of kl and mse."""
        return {"k1": cls.KL, "k2": cls.MSE}.get(str(value))


def estimated_kl(logprobs: Tensor, reference_logprobs: Tensor, penalty: KlPenalty) -> Tensor:
    """Per-token estimates from the sampled tokens' log-probabilities alone.

    logprobs, reference_logprobs: one shape, any; the result has it too. kl, mse and k3 are k1, k2 and k3 of Schulman,
    "Approximating KL Divergence" (2020), abs is |k1|. k1 and k3 are unbiased; k1 alone can be negative. k3 grows
    exponentially where the reference is the likelier one.

    Raises ValueError for `full`, which needs the distributions: see `full_kl`.
    """
    difference = logprobs - reference_logprobs
    if penalty is KlPenalty.KL:
        return difference
    if penalty is KlPenalty.ABS:
        return difference.abs()
    if penalty is KlPenalty.MSE:
        return 0.5 * difference.square()
    if penalty is KlPenalty.K3:
        # exp(−d) − 1 + d, which rounding would turn negative near 0.
        return ((-difference).expm1() + difference).clamp(min=0.0)
    raise ValueError(f"kl_penalty={penalty} is computed from whole distributions, not from the sampled tokens")


def full_kl(distribution: Tensor, reference_distribution: Tensor) -> Tensor:
    """KL(policy ‖ reference) at each position, exactly.

    distribution, reference_distribution: [..., vocabulary] log-probabilities; the result is [...]. A token that the
    policy gives probability 0 contributes 0.
    """
    terms = distribution.exp() * (distribution - reference_distribution)
    return terms.masked_fill(distribution == float("-inf"), 0.0).sum(-1)
