"""Run the benchmarks: `python -m tests.benchmarks [rollout latency swap logprobs score step iteration …]`."""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks import iteration, latency, logprobs, output, rollout, roofline, score, step, swap
from tests.benchmarks.measuring import Report
from tests.support.models import make_tiny_gpt2
from tests.support.processes import process_factory

BENCHMARKS: Mapping[str, Callable[..., Awaitable[Report]]] = {
    "rollout": rollout.measure,
    "latency": latency.measure,
    "swap": swap.measure,
    "logprobs": logprobs.measure,
    "score": score.measure,
    "step": step.measure,
    "iteration": iteration.measure,
}

_WORK: Mapping[str, Callable[..., Any]] = {
    "rollout": rollout.Work,
    "latency": latency.Work,
    "swap": swap.Work,
    "logprobs": logprobs.Work,
    "score": score.Work,
}

_SMALL = {"layers": 6, "width": 256}
_LARGE = {"layers": 12, "width": 768, "heads": 12, "vocab": 50257}
_TINY = {"layers": 2, "width": 32}

_OPTIONS = {"latency": ("first", "gap", "engine"), "logprobs": ("model",)}

_QUICK: Mapping[str, Mapping[str, Any]] = {
    "rollout": {"prompts": 4, "shortest": 2, "longest": 6, "rounds": 1},
    "latency": {"longest": 12, "loads": (0.5, 1.5), "seconds": 0.5, "rollouts": 8},
    "swap": {"models": (_TINY,), "swaps": 1, "rows": 2, "tokens": 24, "rounds": 1},
    "logprobs": {"sequences": 4, "longest": 16, "rounds": 1},
    "score": {"calls": 8, "rounds": 1, "examples": ("python",)},
}


def main(argv: Sequence[str] | None = None) -> None:
    """Make a model of 4.7 M parameters, or of GPT-2's 124 M, then measure; print, and write what was asked for."""
    arguments = _parse(argv)
    names = arguments.names or list(BENCHMARKS)
    torch.set_num_threads(arguments.threads)
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    shape = _TINY if arguments.quick else _LARGE if arguments.large else _SMALL
    document: dict[str, Any] = {"machine": output.machine(), "model": shape, "benchmarks": {}}
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_tiny_gpt2(Path(scratch) / "model", context=256, **shape)
        for name in names:
            limits = roofline.measure(dimension=256, size=2**22) if arguments.quick else roofline.measure()
            with process_factory(Path(scratch) / name) as start:
                work = {"work": _WORK[name](**_changes(name, arguments))} if name in _WORK else {}
                report = asyncio.run(BENCHMARKS[name](folder, start, arguments.threads, **work))
            reached = dict(report.reached(limits))
            report.show()
            print(limits)
            for what, share in reached.items():
                print(f"{share:.0%} of {what}")
            document["benchmarks"][name] = {"limits": asdict(limits), "reached": reached, **report.record()}
            if arguments.plot is not None:
                path: Path = arguments.plot
                output.draw(report, path if len(names) == 1 else path.with_stem(f"{path.stem}-{name}"))
    if arguments.json is not None:
        output.write_json(document, arguments.json)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    known = ", ".join(BENCHMARKS)
    # argparse checks the empty list, too, that stands for no name.
    parser.add_argument("names", nargs="*", choices=[*BENCHMARKS, []], metavar="NAME", help=f"{known}; none = all")
    parser.add_argument("--large", action="store_true", help="with a model of GPT-2's size")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model and little work: whether all runs, the figures say nothing"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of the models (all cores)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there, raw ones too")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw them; several benchmarks to FILE-NAME each (.png .svg .pdf)"
    )
    options = parser.add_argument_group("latency")
    options.add_argument("--first", type=float, metavar="SECONDS", help="objective: to the first token (1)")
    options.add_argument("--gap", type=float, metavar="SECONDS", help="objective: p99 between two tokens (0.2)")
    options.add_argument("--engine", choices=("own", "transformers"), help="of the policy server (own)")
    options = parser.add_argument_group("logprobs")
    options.add_argument("--model", metavar="FOLDER", help="of this model: differences depend on the weights")
    arguments = parser.parse_args(argv)
    if arguments.model is not None and not Path(arguments.model, "config.json").is_file():
        parser.error(f"--model {arguments.model}: there is no config.json in it")
    if arguments.threads < 1:
        parser.error(f"--threads {arguments.threads}: at least 1")
    if arguments.plot is not None and (problem := output.plot_problem(arguments.plot)):
        parser.error(problem)
    for path in (arguments.json, arguments.plot):
        if path is not None and not path.parent.is_dir():
            parser.error(f"{path}: there is no folder {path.parent}")
    return arguments


def _changes(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What this run wants otherwise than a benchmark's Work says."""
    changes = dict(_QUICK[name]) if arguments.quick else {}
    chosen = {option: getattr(arguments, option) for option in _OPTIONS.get(name, ())}
    return changes | {option: value for option, value in chosen.items() if value is not None}


if __name__ == "__main__":
    main()
