"""The KL coefficient that holds the policy near the reference."""

from __future__ import annotations


def adapted_kl_coefficient(value: float, *, kl: float, samples: int, target: float, horizon: float) -> float:
    """The coefficient after a step of `samples` whose mean KL per sample was `kl` nats (Ziegler et al. 2019, sec. 2.2).

    It moves by at most 0.2 · samples / horizon of itself, towards `target`.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return value * (1.0 + error * samples / horizon)
