"""Random tensors for the property tests: modest numbers, ragged masks with holes."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor


@st.composite
def masked(draw: st.DrawFn, tensors: int = 1, max_rows: int = 4, max_time: int = 7) -> tuple[Tensor, ...]:
    """`tensors` doubles [batch, time] and a mask with at least one 1 in every row."""
    rows, time = draw(st.integers(1, max_rows)), draw(st.integers(1, max_time))
    numbers = st.lists(st.floats(-8, 8, width=32), min_size=rows * time, max_size=rows * time)
    values = [torch.tensor(draw(numbers), dtype=torch.float64).view(rows, time) for _ in range(tensors)]
    bits = st.lists(st.booleans(), min_size=time, max_size=time).filter(any)
    mask = torch.tensor([draw(bits) for _ in range(rows)], dtype=torch.float64)
    return (*values, mask)
