"""A run whose trainer is two processes."""

from __future__ import annotations

import contextlib
import os
import re
import signal

import psutil
import pytest
import torch

from tests.integration.failures import Judge
from tests.integration.training import EVALUATION, STEP, World, assert_accounted_once, assert_finished
from tests.support.processes import ProcessUnderTest, wait_for


def process_of(trainer: ProcessUnderTest, rank: int) -> int:
    """The id of a process that torchrun started; 0 while it isn't there."""
    for child in psutil.Process(trainer.pid).children():
        with contextlib.suppress(psutil.Error):
            if child.environ().get("RANK") == str(rank):
                return child.pid
    return 0


def assert_near(world: World, run: str, other: str) -> None:
    ours, theirs = world.final_parameters(run), world.final_parameters(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        own = ours[name]
        if name.endswith("c_attn.bias"):  # softmax ignores what is added to all keys, so rounding noise rules there
            own, tensor = (torch.cat([each[:32], each[64:]]) for each in (own, tensor))
        torch.testing.assert_close(own, tensor, rtol=0, atol=1e-5, msg=lambda said, name=name: name + said)


STOPPED = -1
LORA = {"lora_rank": 4, "learning_rate": 1e-4}


@pytest.mark.parametrize(
    ("sharding", "victim", "lora"),
    [
        ("none", STOPPED, {}),
        ("fsdp", 0, {}),
        pytest.param("none", 1, {}, marks=pytest.mark.slow),
        pytest.param("fsdp", STOPPED, LORA, marks=pytest.mark.slow),
    ],
)
def test_a_run_on_two_ranks_that_is_stopped_or_loses_one_ends_near_one_of_a_single_process(
    world: World, sharding: str, victim: int, lora: dict[str, object]
) -> None:
    run, alone = f"two-{sharding}-{victim}", f"alone-{sharding}-{victim}"
    # At a small rate rounding does not reach a sampled token.
    settings = {"steps": 3, "learning_rate": 1e-5, "reference": "trainer", **lora}
    assert_finished(world.trainer(alone, **settings))

    two = {**settings, "sharding": sharding, "ranks": 2, "processes": 2}
    judge = Judge(world, run, allow=EVALUATION + STEP)
    trainer = world.trainer(run, **two, reward=judge.server, save_every=1 if victim >= 0 else 100)
    wait_for(lambda: trainer.poll() is not None or world.steps_done(run) >= 1, within=120, what="first step")
    rank = wait_for(lambda: process_of(trainer, max(victim, 0)), within=20, what="process of the rank")
    os.kill(rank, signal.SIGTERM if victim == STOPPED else signal.SIGKILL)
    judge.allow_all()
    if victim == STOPPED:
        trainer.wait_exit(within=90)
        assert re.search(r"exitcode\s*:\s*143", trainer.log_text()), trainer.log_text()[-4000:]
        assert list((world.folder / run / "checkpoints").iterdir()), trainer.log_text()[-4000:]
    else:
        assert trainer.wait_exit(within=90) != 0
        assert victim or "another process of this run ended" in trainer.log_text(), trainer.log_text()[-4000:]
    assert_finished(world.trainer(run, "--resume", **two, reward=judge.server))

    assert_accounted_once(world, run)
    assert_near(world, run, alone)
    kls = [line["kl_mean"] for name in (run, alone) for line in world.lines(name, "metrics.jsonl", "evaluation")]
    assert len(kls) % 2 == 0
    assert kls[: len(kls) // 2] == pytest.approx(kls[len(kls) // 2 :], abs=1e-5)


def test_a_sharded_run_goes_on_in_one_process(world: World) -> None:
    run = "narrowed"
    assert_finished(world.trainer(run, steps=1, ranks=2, sharding="fsdp"))
    assert_finished(world.trainer(run, "--resume", steps=2))
    assert world.steps_done(run) == 2


def test_what_the_launcher_asks_for_in_vain_is_refused(world: World) -> None:
    alone = world.trainer("sharded alone", run_id="alone", sharding="fsdp")
    assert alone.wait_exit() == 78
    assert "parts the model among processes, and there is one" in alone.log_text()
    few = world.trainer("few", processes=2)
    assert few.wait_exit() == 78
    assert "--processes is 2, but 1 train together" in few.log_text()
    assert not (world.folder / "few").exists()
