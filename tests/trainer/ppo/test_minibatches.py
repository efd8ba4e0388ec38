from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from trainer.ppo.minibatches import split_into_updates


def test_a_full_batch_is_cut_in_order() -> None:
    assert split_into_updates(range(8), mini_batch_size=2, gradient_accumulation_steps=2) == [
        [[0, 1], [2, 3]],
        [[4, 5], [6, 7]],
    ]


@given(st.integers(1, 200), st.integers(1, 40), st.integers(1, 5))
def test_every_sample_is_in_one_mini_batch_and_all_updates_are_alike(samples: int, size: int, steps: int) -> None:
    order = list(reversed(range(samples)))
    updates = split_into_updates(order, mini_batch_size=size, gradient_accumulation_steps=steps)
    assert [row for update in updates for chosen in update for row in chosen] == order
    assert len(updates) == math.ceil(samples / (size * steps))
    assert all(1 <= len(chosen) <= size for update in updates for chosen in update)
    assert all(len(update) <= steps for update in updates)
    lengths = [sum(map(len, update)) for update in updates]
    assert max(lengths) - min(lengths) <= 1
