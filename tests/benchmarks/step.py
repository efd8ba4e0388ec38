"""Seconds and memory of one PPO step: ours against TRL 0.11.4 in its own environment, on the same data."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from tests.benchmarks.measuring import Measurement
from tests.benchmarks.roofline import Limits
from tests.benchmarks.stepping import BATCH
from tests.support.processes import StartProcess
from trainer.model import AutoModelForCausalLMWithValueHead

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PROMPT_TOKENS, SHORTEST, LONGEST = 16, 8, 32
_ROOT = Path(__file__).resolve().parents[2]
_TRL = "TRL 0.11.4"
_ROUNDS = 3


@dataclass(frozen=True)
class Steps:
    """What each side answered in each round, TRL first, and how far our parameters lie from TRL's after one step."""

    rounds: Mapping[str, list[dict[str, Any]]]
    difference: float
    """The largest of any parameter, in fp32, but for the key third of `c_attn.bias`, which has no gradient."""
    key_bias: float
    """The largest there."""

    def show(self) -> None:
        """Print the tables."""
        parts = list(self.rounds[_TRL][0]["seconds"])
        table = Table(title=f"a PPO step on {BATCH} x ({PROMPT_TOKENS} + {SHORTEST}..{LONGEST}) tokens")
        for heading in ("", *(f"{part}, s" for part in parts), "ratio", "peak, MB", "above models, MB", "ratio"):
            table.add_column(heading, justify="left" if not heading else "right")
        for name, rounds in self.rounds.items():
            table.add_row(
                name,
                *(f"{statistics.median(each['seconds'][part] for each in rounds):.2f}" for part in parts),
                f"{self._faster(name):.2f}",
                *(f"{rounds[-1][memory] / 1e6:,.0f}" for memory in ("peak", "above_models")),
                f"{rounds[-1]['above_models'] / self.rounds[_TRL][-1]['above_models']:.2f}",
            )
        console = Console(width=160)
        console.print(table)
        console.print(f"largest difference of a parameter from TRL's after the first step: {self.difference:.1e}")
        console.print(f"in the key third of c_attn.bias, left out above: {self.key_bias:.1e}")

    def record(self) -> dict[str, Any]:
        """See Report."""
        return {
            "rounds": {name: list(rounds) for name, rounds in self.rounds.items()},
            "ratios": {name: self._faster(name) for name in self.rounds},
            "largest_difference": self.difference,
            "key_bias_difference": self.key_bias,
        }

    def draw(self, figure: Figure) -> None:
        """See Report."""
        seconds = {name: [each["seconds"]["step"] for each in rounds] for name, rounds in self.rounds.items()}
        Measurement("a PPO step", "s", seconds).draw(figure)

    def reached(self, limits: Limits) -> Mapping[str, float]:
        """See Report."""
        return {}

    def _faster(self, name: str) -> float:
        """Median over rounds of TRL's seconds over those of `name`."""
        pairs = zip(self.rounds[_TRL], self.rounds[name], strict=True)
        return statistics.median(theirs["seconds"]["step"] / own["seconds"]["step"] for theirs, own in pairs)


async def measure(folder: Path, _start: StartProcess, threads: int) -> Steps:
    """One step of each to warm up, then rounds in turn; every side goes on from its own weights.

    bf16 takes part where the CPU multiplies it: elsewhere a step takes minutes. TRL_PYTHON names the interpreter that
    has TRL; unset: the one that `make .venv-trl/.ready` makes.
    """
    trl = os.environ.get("TRL_PYTHON", str(_ROOT / ".venv-trl/bin/python"))
    if shutil.which(trl) is None:
        raise SystemExit(f"{trl} does not exist: run `make .venv-trl/.ready`, or name TRL's interpreter in TRL_PYTHON")
    scratch = folder.parent / "step"
    scratch.mkdir()
    _make_inputs(folder, scratch)
    here = (sys.executable, "-m", "tests.benchmarks.step_here", str(scratch), str(threads))
    commands: dict[str, Sequence[str]] = {
        _TRL: (trl, str(Path(__file__).with_name("step_in_trl.py")), str(scratch), str(threads)),
        "ours": (*here, "no"),
    }
    if torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "NO AVX", "AVX2"):
        commands["ours, bf16"] = (*here, "bf16")
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    with contextlib.ExitStack() as running:
        sides = {name: running.enter_context(_side(command, threads)) for name, command in commands.items()}
        for _ in range(1 + _ROUNDS):
            for name, side in sides.items():
                answers[name].append(side.step())
    theirs = torch.load(scratch / "trl.pt", weights_only=True)
    ours = torch.load(scratch / "ours-no.pt", weights_only=True)
    difference, key_bias = _difference(ours, theirs)
    return Steps({name: each[1:] for name, each in answers.items()}, difference, key_bias)


class _Side:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        assert self._line() == "ready\n"

    def step(self) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._line())
        return answer

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args} ended with {self._process.wait()}")
        return line


@contextlib.contextmanager
def _side(command: Sequence[str], threads: int) -> Iterator[_Side]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        command, env=environment, cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield _Side(process)
        finally:
            process.kill()


def _make_inputs(folder: Path, scratch: Path) -> None:
    """The model with a value head, and samples drawn from it, so that their log-probabilities are a rollout's.

    Its weights are as narrow as GPT-2's at the start: those of `folder` are so wide that a deep model blows rounding up
    beyond any comparison.
    """
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder, initializer_range=0.02)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(
        AutoModelForCausalLM.from_config(config), v_head_init_strategy="normal"
    )
    torch.nn.init.constant_(model.v_head.summary.bias, 0.1)
    model.save_pretrained(scratch / "model")
    prompts = torch.randint(0, 256, (BATCH, PROMPT_TOKENS))
    rows = model.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=True,
        top_k=0,
        min_new_tokens=LONGEST,
        max_new_tokens=LONGEST,
        pad_token_id=0,
    )
    lengths = torch.randint(SHORTEST, LONGEST + 1, (BATCH,)).tolist()
    samples = {
        "queries": prompts.tolist(),
        "responses": [row[PROMPT_TOKENS:][:length].tolist() for row, length in zip(rows, lengths, strict=True)],
        "scores": torch.randn(BATCH).tolist(),
    }
    (scratch / "samples.json").write_text(json.dumps(samples))


def _difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[float, float]:
    """The largest between any two parameters, but for the key third of `c_attn.bias`; and that."""
    assert ours.keys() == theirs.keys()
    apart, keys = 0.0, 0.0
    for name, value in ours.items():
        difference = (value - theirs[name]).abs()
        if name.endswith("attn.c_attn.bias"):
            query, key, value = difference.chunk(3)
            keys = max(keys, key.max().item())
            difference = torch.cat([query, value])
        apart = max(apart, difference.max().item())
    return apart, keys
