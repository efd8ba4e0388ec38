"""Which operators run on one thread, and which on all."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from policy_server.engine.threads import sparing_threads, waking_for


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_small_operators_run_on_one_thread_and_large_ones_on_all() -> None:
    with sparing_threads():
        assert torch.get_num_threads() == 1
        with waking_for(1000):
            assert torch.get_num_threads() == 1
        with waking_for(10**8):
            assert torch.get_num_threads() == 3
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 3


def test_an_error_leaves_the_threads_as_they_were() -> None:
    with pytest.raises(ValueError, match="in an operator"), sparing_threads(), waking_for(10**8):
        raise ValueError("in an operator")
    assert torch.get_num_threads() == 3


def test_nothing_is_woken_where_nothing_was_spared() -> None:
    torch.set_num_threads(2)
    with waking_for(10**8):
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == 2
