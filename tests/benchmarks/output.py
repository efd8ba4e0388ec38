"""What the benchmarks write: one JSON document of a run, and a picture for each benchmark."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from tests.benchmarks.measuring import Report

PLOT_FORMATS = (".png", ".svg", ".pdf")


def machine() -> dict[str, Any]:
    """What the figures depend on. load_average: of the minute before; well above 0, others compute here too."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "transformers", "grpcio")},
        "load_average": os.getloadavg()[0],
    }


def write_json(document: dict[str, Any], path: Path) -> None:
    """What is not a number, a percentile of nothing, becomes null: JSON has no such thing."""
    path.write_text(json.dumps(_with_nulls(document), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def plot_problem(path: Path) -> str | None:
    """Why no picture can be written to `path`; None = it can."""
    if path.suffix not in PLOT_FORMATS:
        return f"--plot {path}: the name must end with one of {' '.join(PLOT_FORMATS)}"
    if importlib.util.find_spec("matplotlib") is None:
        return "--plot needs matplotlib, which is not installed: pip install 'rlhf-services[dev]'"
    return None


def draw(report: Report, path: Path) -> None:
    """The report's picture, in the format that the name ends with."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    report.draw(figure)
    figure.savefig(path, dpi=120)


def _cpu_model() -> str:
    """Linux alone says it in full."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _with_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _with_nulls(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_with_nulls(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
