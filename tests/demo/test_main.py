"""The demo from the outside: three real processes, on a model small enough to take seconds."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlhf.config import load_settings
from tests.support.models import make_tiny_gpt2
from tests.support.processes import ROOT, wait_for
from trainer.settings import TrainerSettings

NEEDED = ["--model", "m", "--policy-server", "h:1", "--reward-server", "h:2", "--run-dir", "r", "--data", "d.jsonl"]


@pytest.mark.parametrize("name", ["trainer.yaml", "trainer-own-model.yaml"])
def test_the_shipped_settings_are_settings_of_the_trainer(name: str) -> None:
    settings = load_settings(TrainerSettings, ["--config", str(ROOT / "demo" / name), *NEEDED], prog="trainer")
    assert settings.eval_prompts == 128


class Demo:
    """`python -m demo` on a tiny model, in a session of its own, its output in a file."""

    def __init__(self, folder: Path, *trainer: str) -> None:
        self.run_dir = folder / "runs" / "demo"
        self._output = folder / "output.txt"
        model = make_tiny_gpt2(folder / "model")
        data = folder / "prompts.jsonl"
        data.write_text("".join(json.dumps({"prompt": f"It is {i}"}) + "\n" for i in range(40)))
        arguments = ["--model", str(model), "--data", str(data), "--reward", "length"]
        arguments += [
            "--reward-options",
            "{target: 8}",
            "--run-dir",
            str(self.run_dir),
            "--cache",
            str(folder / "cache"),
        ]
        small = ["--batch-size", "8", "--mini-batch-size", "8", "--eval-prompts", "4", "--max-new-tokens", "8"]
        with self._output.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "demo", *arguments, "--", *small, *trainer],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def output(self) -> str:
        return self._output.read_text(errors="replace")

    def pids(self) -> dict[str, int]:
        """Of the three, once all have been announced."""

        def announced() -> dict[str, int] | None:
            assert self.process.poll() is None, self.output()
            found = dict(re.findall(r"^(\w+) +pid (\d+):", self.output(), re.M))
            return {name: int(pid) for name, pid in found.items()} if len(found) == 3 else None

        return wait_for(announced, within=90, what="announcement of three processes") or {}


@pytest.fixture
def demos(tmp_path: Path) -> Iterator[list[Demo]]:
    started: list[Demo] = []
    yield started
    for demo in started:
        if demo.process.poll() is None:
            demo.process.terminate()
            demo.process.wait(60)


def test_it_runs_to_the_end_and_writes_what_it_promises(tmp_path: Path, demos: list[Demo]) -> None:
    demo = Demo(tmp_path, "--steps", "2", "--eval-every", "1")
    demos.append(demo)
    assert demo.process.wait(180) == 0, demo.output()
    report = json.loads((demo.run_dir / "report.json").read_text())
    assert len(set(report["pids"].values())) == 3
    assert len(set(report["ports"].values())) == 3
    assert report["steps"] == 2
    for name in ("reward_before", "reward_after", "kl", "seconds"):
        assert isinstance(report[name], float)
    for name in ("metrics.jsonl", "samples.jsonl", "report.html", "model/config.json", "checkpoints"):
        assert (demo.run_dir / name).exists()
    assert "before" in demo.output()
    assert not [pid for pid in report["pids"].values() if psutil.pid_exists(pid)]


def run_on_reviews(run_dir: Path, *trainer_flags: str) -> dict[str, Any]:
    """The report of the demo as it is shipped, but for flags of the trainer."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    # Without --cache: the base model that `make demo` trained here, if it did, is the one under test.
    result = subprocess.run(
        [sys.executable, "-m", "demo", "--run-dir", str(run_dir), "--", *trainer_flags],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1100,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    report: dict[str, Any] = json.loads((run_dir / "report.json").read_text())
    return report


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_an_adapter_is_taught_praise_too(tmp_path: Path) -> None:
    report = run_on_reviews(tmp_path / "run", "--lora-rank", "16", "--learning-rate", "1e-3")

    assert report["reward_after"] - report["reward_before"] >= 0.2
    assert report["kl"] <= 15
    assert report["distinct_after"] >= 0.9
    adapter = tmp_path / "run" / "checkpoints" / "step-000025" / "adapter_model.safetensors"
    assert adapter.stat().st_size < (tmp_path / "run" / "model" / "model.safetensors").stat().st_size / 3


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_as_shipped_it_teaches_praise_and_still_writes_many_different_reviews(tmp_path: Path) -> None:
    report = run_on_reviews(tmp_path / "run")

    assert report["prompts"] == 128
    assert report["reward_after"] - report["reward_before"] >= 0.35
    assert report["kl"] <= 15
    assert report["distinct_after"] >= 0.9
    assert 0.5 <= report["length_after"] / report["length_before"] <= 1.5
    assert len(set(report["pids"].values())) == 3


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["reward_server", "policy_server", "trainer"])
def test_the_loss_of_a_process_is_reported_and_ends_the_others(tmp_path: Path, demos: list[Demo], victim: str) -> None:
    demo = Demo(tmp_path, "--steps", "100000")
    demos.append(demo)
    pids = demo.pids()
    os.kill(pids[victim], signal.SIGKILL)
    assert demo.process.wait(60) == 1
    assert f"{victim} (pid {pids[victim]}) was ended by SIGKILL" in demo.output()
    assert not [pid for pid in pids.values() if psutil.pid_exists(pid)]


@pytest.mark.slow
def test_ctrl_c_stops_all_three(tmp_path: Path, demos: list[Demo]) -> None:
    demo = Demo(tmp_path, "--steps", "100000")
    demos.append(demo)
    pids = demo.pids()
    demo.process.send_signal(signal.SIGINT)
    assert demo.process.wait(60) == 130
    assert not [pid for pid in pids.values() if psutil.pid_exists(pid)]


def test_a_reward_that_cannot_be_loaded_is_reported(tmp_path: Path) -> None:
    arguments = ["--model", str(make_tiny_gpt2(tmp_path / "model")), "--data", "x.jsonl", "--reward", "vadar"]
    result = subprocess.run(
        [sys.executable, "-m", "demo", *arguments, "--run-dir", str(tmp_path / "run")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert result.returncode == 1
    assert "Did you mean 'vader'" in result.stdout


def test_a_folder_that_no_run_made_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    result = subprocess.run(
        [sys.executable, "-m", "demo", "--run-dir", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 1
    assert "give another --run-dir" in result.stdout
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
