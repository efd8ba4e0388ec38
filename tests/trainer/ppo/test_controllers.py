from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.ppo.controllers import adapted_kl_coefficient


def adapted(kl: float, *, samples: int = 100) -> float:
    return adapted_kl_coefficient(0.2, kl=kl, samples=samples, target=6.0, horizon=10_000.0)


def test_the_coefficient_rests_at_the_target() -> None:
    assert adapted(6.0) == 0.2


def test_inside_the_clip_it_moves_with_the_error() -> None:
    assert adapted(6.6) == pytest.approx(0.2 * (1 + 0.1 * 100 / 10_000))
    assert adapted(5.4) == pytest.approx(0.2 * (1 - 0.1 * 100 / 10_000))


@given(st.floats(-1e6, 1e6), st.integers(1, 1000))
def test_one_step_moves_it_by_a_fifth_of_samples_over_horizon_at_most(kl: float, samples: int) -> None:
    assert abs(adapted(kl, samples=samples) / 0.2 - 1) <= 0.2 * samples / 10_000 * (1 + 1e-9)
