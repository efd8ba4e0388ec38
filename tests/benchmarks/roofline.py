"""What this machine can do at most, taken right before each benchmark: products per second, and memory traffic.

A roofline (Williams, Waterman & Patterson 2009): no work is done in less time than its arithmetic takes at the first,
or its traffic at the second.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from tests.benchmarks import onednn


@dataclass(frozen=True)
class Limits:
    """The best of several tries, by all threads of torch, in float32.

    FLOP/s: a square product by torch.mm, and by the faster of oneDNN's kernels with a packed weight. Bytes/s: read from
    memory, and copied into memory in use (each byte counted once).
    """

    mm_flops: float
    onednn_flops: float
    read_bytes: float
    copied_bytes: float

    @property
    def flops(self) -> float:
        """FLOP/s of the fastest product known here."""
        return max(self.mm_flops, self.onednn_flops)

    def seconds(self, flops: float, read: float) -> float:
        """The least time for so many floating-point operations and bytes read from memory."""
        return max(flops / self.flops, read / self.read_bytes)

    def __str__(self) -> str:
        return (
            f"this machine: torch.mm {self.mm_flops / 1e9:,.0f} GFLOP/s, oneDNN {self.onednn_flops / 1e9:,.0f}; "
            f"memory read at {self.read_bytes / 1e9:.1f} GB/s, copied at {self.copied_bytes / 1e9:.1f}"
        )


@torch.inference_mode()
def measure(*, dimension: int = 2048, size: int = 2**28) -> Limits:
    """Of products of `dimension` cubed, and of `size` bytes of memory, which should be many times the last cache."""
    left, weight = torch.rand(dimension, dimension), torch.rand(dimension, dimension)
    packed, convolved = onednn.packed_for_linear(weight), onednn.packed_for_convolution(weight, dimension)
    source = torch.ones(size // 4)
    target = torch.empty_like(source)
    mm, linear, convolution, read, copy = fastest(
        partial(torch.mm, left, weight),
        partial(onednn.linear, left, packed, None),
        partial(onednn.convolution, left, convolved, None, dimension),
        partial(torch.sum, source),
        partial(target.copy_, source),
    )
    flops = 2.0 * dimension**3
    return Limits(flops / mm, flops / min(linear, convolution), source.nbytes / read, source.nbytes / copy)


def fastest(*works: Callable[[], object], rounds: int = 7) -> list[float]:
    """The least seconds that each took, in turn: noise only ever adds."""
    best = [float("inf")] * len(works)
    for _ in range(rounds):
        for place, work in enumerate(works):
            began = time.perf_counter()
            work()
            best[place] = min(best[place], time.perf_counter() - began)
    return best
