"""A small run over three real processes, and what its tests need to follow and disturb it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.reward_server.examples.servers import ExampleServer
from tests.support.models import make_tiny_gpt2
from tests.support.processes import ProcessUnderTest, StartProcess, as_flags, process_factory

POLICY_FLAGS = ("--reproducible", "--threads", "1", "--managed")
ROWS = 60
STEPS = 5
EVALUATION, STEP = 4, 8
"""Samples of each, unless a test says otherwise."""

VOWELS = '''
def reward(prompts, completions, **columns):
    """The share of vowels and spaces."""
    return [sum(text.count(letter) for letter in "aeiou ") / (1 + len(text)) for text in completions]
'''


class World:
    """A folder with a model, data and rewards, and two servers, `policy` and `reward`, that tests share or restart."""

    def __init__(self, folder: Path, start: StartProcess) -> None:
        self.folder = folder
        self.start = start
        self.model = make_tiny_gpt2(folder / "model")
        self.weights_folder = folder / "weights"
        self.weights_folder.mkdir()
        self.data = folder / "data.jsonl"
        rows = ({"prompt": f"The film {row} was", "stars": row % 5} for row in range(ROWS))
        self.data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.policy = self.policy_server()
        self.reward = self.reward_server()

    def restart_policy(self) -> None:
        """Start the policy server, which was killed, where it was."""
        self.policy = self.policy_server(listen=self.policy.address)

    def policy_server(
        self,
        *more: str,
        listen: str = "127.0.0.1:0",
        model: Path | None = None,
        env: dict[str, str] | None = None,
    ) -> ProcessUnderTest:
        """A policy server of `model`, or of the world's; returns at once."""
        flags = (*POLICY_FLAGS, *more, "--weights-root", str(self.weights_folder))
        return self.start("policy_server", "--model", str(model or self.model), *flags, listen=listen, env=env)

    def reward_server(
        self, source: str = VOWELS, *, listen: str = "127.0.0.1:0", name: str = "vowels"
    ) -> ProcessUnderTest:
        """A reward server of the function `reward` in `source`; returns at once."""
        file = self.folder / f"{name}.py"
        file.write_text(source)
        return self.start("reward_server", "--reward", f"{file}:reward", listen=listen)

    def trainer(
        self,
        run: str,
        *flags: str,
        reward: ProcessUnderTest | ExampleServer | None = None,
        reproducible: bool = True,
        env: dict[str, str] | None = None,
        ranks: int = 1,
        **settings: object,
    ) -> ProcessUnderTest:
        """A trainer of run `run` in a folder of that name; `settings` replace what is set here, None by nothing."""
        values: dict[str, object] = {
            "model": self.model,
            "policy_server": self.policy.address,
            "reward_server": (reward or self.reward).address,
            "data": self.data,
            "run_dir": self.folder / run,
            "run_id": run,
            "steps": STEPS,
            "batch_size": STEP,
            "mini_batch_size": 4,
            "max_new_tokens": 32,
            "rollout_concurrency": 2,
            "eval_prompts": EVALUATION,
            "eval_every": 2,
            "save_every": 1,
            "learning_rate": 1e-3,
            # Where it is in its schedule is something to go on from, too.
            "lr_scheduler": "linear",
            "threads": 1,
            "log_format": "text",
            **settings,
        }
        given = ["--reproducible"] if reproducible else []
        return self.start("trainer", *as_flags(values), *given, *flags, listen=None, env=env, ranks=ranks)

    def lines(self, run: str, file: str, kind: str | None = None) -> list[dict[str, Any]]:
        """The whole lines of a run's .jsonl file so far, of one kind if given."""
        path = self.folder / run / file
        if not path.exists():
            return []
        text = path.read_text()
        records = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        return [record for record in records if kind is None or record["kind"] == kind]

    def accounting(self, run: str) -> list[dict[str, Any]]:
        """accounting.jsonl, its sample ids without the run's: equal for runs that did the same."""
        lines = self.lines(run, "accounting.jsonl")
        return [{**line, "sample_id": line.get("sample_id", "").partition("/")[2]} for line in lines]

    def steps_done(self, run: str) -> int:
        """PPO steps whose line is written."""
        return len(self.lines(run, "metrics.jsonl", "step"))

    def final_parameters(self, run: str) -> dict[str, torch.Tensor]:
        """Every tensor of the finished run's model, value head included."""
        return load_file(self.folder / run / "model" / "model.safetensors")


def assert_finished(trainer: ProcessUnderTest) -> None:
    """The trainer ends by itself, successfully."""
    assert trainer.wait_exit(within=180) == 0, trainer.log_text()[-4000:]


@contextmanager
def small_world(folder: Path) -> Iterator[World]:
    """A world whose processes end with the block."""
    with process_factory(folder / "processes") as start:
        yield World(folder, start)


def metric(process: ProcessUnderTest, name: str, **labels: str) -> float:
    """A sample of the process's Prometheus endpoint, the sum over label sets that match; 0 when there is none."""
    total = 0.0
    for line in process.metrics_text().splitlines():
        match = re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)", line)
        if match and match[1] == name and all(f'{key}="{value}"' in (match[2] or "") for key, value in labels.items()):
            total += float(match[3])
    return total


def published(policy: ProcessUnderTest) -> float:
    """How often the policy server took new weights."""
    return metric(policy, "grpc_server_handled_total", grpc_method="UpdateWeights", grpc_code="OK")


def assert_same_bits(world: World, run: str, other: str) -> None:
    """Every tensor of the two finished runs is equal, bit for bit."""
    ours, theirs = world.final_parameters(run), world.final_parameters(other)
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different


def assert_accounted_once(world: World, run: str) -> None:
    """Every prompt drawn is in accounting.jsonl once, in the cursor's order, without a gap."""
    assert_drawn_once(world.lines(run, "accounting.jsonl"))


def assert_drawn_once(accounting: Sequence[Mapping[str, Any]]) -> None:
    """No prompt is accounted twice, none is left out, and they are in the cursor's order."""
    places = [(line["epoch"], line["position"]) for line in accounting]
    assert len(set(places)) == len(places)
    assert places == sorted(places)
    rows = len({line["row"] for line in accounting if line["epoch"] == 0})
    in_first_pass = [position for epoch, position in places if epoch == 0]
    assert in_first_pass == list(range(len(in_first_pass)))
    assert rows == len(in_first_pass)
