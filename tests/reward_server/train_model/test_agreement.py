from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_server.train_model.agreement import pearson, rmse, spearman

PAIRS = st.lists(st.tuples(st.integers(-50, 50), st.integers(-50, 50)), min_size=2, max_size=40)


def columns(pairs: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    table = np.array(pairs, dtype=float)
    return table[:, 0], table[:, 1]


@given(PAIRS)
def test_pearson_is_that_of_the_standard_library(pairs: list[tuple[int, int]]) -> None:
    a, b = columns(pairs)
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert math.isnan(pearson(a, b))
    else:
        assert pearson(a, b) == pytest.approx(statistics.correlation(a.tolist(), b.tolist()), abs=1e-9)


@given(PAIRS)
def test_spearman_sees_only_the_order(pairs: list[tuple[int, int]]) -> None:
    a, b = columns(pairs)
    assert spearman(a, b) == pytest.approx(spearman(np.exp(a / 10), b**3), nan_ok=True)


def test_equal_values_share_the_mean_of_their_ranks() -> None:
    a, b = np.array([1.0, 2.0, 2.0, 3.0]), np.array([1.0, 3.0, 2.0, 4.0])
    assert spearman(a, b) == pytest.approx(pearson(np.array([1.0, 2.5, 2.5, 4.0]), b))


def test_rmse_of_a_known_difference() -> None:
    assert rmse(np.array([1.0, 2.0]), np.array([4.0, -2.0])) == pytest.approx(math.sqrt((9 + 16) / 2))
