"""Run the benchmarks: `python -m tests.benchmarks [rollout swap score iteration …]`."""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks import iteration, rollout, score, swap
from tests.support.models import make_tiny_gpt2
from tests.support.processes import StartProcess, process_factory

BENCHMARKS: Mapping[str, Callable[[Path, StartProcess, int], Awaitable[Any]]] = {
    "rollout": rollout.measure,
    "swap": swap.measure,
    "score": score.measure,
    "iteration": iteration.measure,
}


_SMALL = {"layers": 6, "width": 256}
_LARGE = {"layers": 12, "width": 768, "heads": 12, "vocab": 50257}


def main() -> None:
    """Make a model of 4.7 M parameters, or of GPT-2's 124 M, then measure on all cores."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*BENCHMARKS, []], help="which ones; none = all")
    parser.add_argument("--large", action="store_true", help="with a model of GPT-2's size")
    arguments = parser.parse_args()
    names = arguments.names or list(BENCHMARKS)
    threads = os.cpu_count() or 1
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    with tempfile.TemporaryDirectory() as scratch:
        sizes = _LARGE if arguments.large else _SMALL
        folder = make_tiny_gpt2(Path(scratch) / "model", context=256, **sizes)
        for name in names:
            with process_factory(Path(scratch) / name) as start:
                asyncio.run(BENCHMARKS[name](folder, start, threads)).show()


if __name__ == "__main__":
    main()
