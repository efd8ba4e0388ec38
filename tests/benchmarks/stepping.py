"""One side of the `step` benchmark: a process that makes PPO steps on demand, in our environment or in TRL's.

Imports nothing of ours, since TRL's environment has none of it. Each line on standard input is one step; the answer is
a line of JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

BATCH, MINI_BATCH, EPOCHS = 64, 16, 4

_PARTS = {
    "forwards": ("time/ppo/forward_pass",),
    "rewards, advantages, statistics": (
        "time/ppo/compute_rewards",
        "time/ppo/compute_advantages",
        "time/ppo/calc_stats",
    ),
    "epochs": ("time/ppo/optimize_step",),
    "step": ("time/ppo/total",),
}


def read_samples(folder: Path) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Queries, responses and scores, as both libraries' `step` takes them."""
    samples = json.loads((folder / "samples.json").read_text())
    queries, responses = (
        [torch.tensor(ids, dtype=torch.int64) for ids in samples[name]] for name in ("queries", "responses")
    )
    return queries, responses, [torch.tensor(score, dtype=torch.float32) for score in samples["scores"]]


def serve(step: Callable[[], Mapping[str, Any]], models: Sequence[torch.nn.Module], written: Path) -> None:
    """Answer with the seconds of each part and the peak of resident memory, in bytes.

    models: the trained one and the reference. The first's parameters after the first step go to the file `written`.
    """
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for parameter in (parameter for each in models for parameter in each.parameters()):
        parameter.sum()  # a file that is mapped becomes resident as it is read
    before = _resident("VmRSS")
    for _ in sys.stdin:
        statistics = step()
        if not written.exists():
            torch.save({name: value.detach().clone() for name, value in models[0].named_parameters()}, written)
        peak = _resident("VmHWM")
        seconds = {part: sum(float(statistics[key]) for key in keys) for part, keys in _PARTS.items()}
        sys.stdout.write(json.dumps({"seconds": seconds, "peak": peak, "above_models": peak - before}) + "\n")
        sys.stdout.flush()


def _resident(field: str) -> int:
    """Bytes. getrusage would not do: its peak begins at that of the process that started this one."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].removesuffix("kB")) * 1024
