"""A trainer that is stopped or killed goes on as if nothing had happened."""

from __future__ import annotations

import random
import signal
import time

import pytest

from tests.integration.training import STEPS, World, assert_accounted_once, assert_finished, assert_same_bits
from tests.support.processes import wait_for


def assert_equal_runs(world: World, run: str, other: str) -> None:
    assert_same_bits(world, run, other)
    assert_accounted_once(world, run)
    for file in ("accounting.jsonl", "samples.jsonl"):
        assert world.lines(run, file) == world.lines(other, file)
    ours, theirs = (world.lines(name, "metrics.jsonl") for name in (run, other))
    assert [(line["kind"], line["step"]) for line in ours] == [(line["kind"], line["step"]) for line in theirs]


def test_a_run_that_is_stopped_then_killed_ends_like_one_that_was_left_alone(world: World, uninterrupted: str) -> None:
    run = "stopped"
    trainer = world.trainer(run, save_every=100)
    wait_for(lambda: world.steps_done(run) >= 1, within=120, what="first step")
    trainer.signal(signal.SIGTERM)
    assert trainer.wait_exit(within=60) == 143, trainer.log_text()
    stopped_at = world.steps_done(run)
    assert (world.folder / run / "checkpoints" / f"step-{stopped_at:06d}").is_dir()

    killed = world.trainer(run, "--resume")
    wait_for(lambda: world.steps_done(run) > stopped_at, within=120, what="another step")
    killed.kill()
    assert_finished(world.trainer(run, "--resume"))

    assert_equal_runs(world, run, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(10))
def test_a_run_killed_at_a_random_moment_ends_like_one_that_was_left_alone(
    world: World, uninterrupted: str, number: int
) -> None:
    moment = random.Random(number)
    run = f"killed-{number}"
    trainer = world.trainer(run, save_every=moment.choice([1, 2]))
    after = moment.randrange(STEPS)
    wait_for(lambda: world.steps_done(run) >= after, within=120, what=f"{after} steps")
    # A random moment is what is tested here, not a wait for something.
    time.sleep(moment.uniform(0.0, 0.6))
    trainer.kill()

    assert_finished(world.trainer(run, "--resume"))

    assert_equal_runs(world, run, uninterrupted)
