"""A trainer that is stopped or killed goes on as if nothing had happened."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator

import pytest

from tests.integration.training import World, assert_accounted_once, assert_same_bits, small_world
from tests.support.processes import ProcessUnderTest, wait_for

STEPS = 5


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with small_world(tmp_path_factory.mktemp("resume")) as world:
        yield world


@pytest.fixture(scope="module")
def servers(world: World) -> tuple[ProcessUnderTest, ProcessUnderTest]:
    return world.policy_server(), world.reward_server()


@pytest.fixture(scope="module")
def uninterrupted(world: World, servers: tuple[ProcessUnderTest, ProcessUnderTest]) -> str:
    """The name of a run that nothing disturbed."""
    trainer = world.trainer(*servers, "uninterrupted", run_id="uninterrupted", steps=STEPS)
    assert trainer.wait_exit(within=180) == 0, trainer.log_text()
    return "uninterrupted"


def finish(world: World, servers: tuple[ProcessUnderTest, ProcessUnderTest], run: str) -> None:
    trainer = world.trainer(*servers, run, "--resume", run_id=run, steps=STEPS)
    assert trainer.wait_exit(within=180) == 0, trainer.log_text()


def assert_equal_runs(world: World, run: str, other: str) -> None:
    assert_same_bits(world.final_parameters(run), world.final_parameters(other))
    assert_accounted_once(world, run)
    for file in ("accounting.jsonl", "samples.jsonl"):
        assert world.lines(run, file) == world.lines(other, file)
    ours, theirs = (world.lines(name, "metrics.jsonl") for name in (run, other))
    assert [(line["kind"], line["step"]) for line in ours] == [(line["kind"], line["step"]) for line in theirs]


def test_a_run_that_is_stopped_then_killed_ends_like_one_that_was_left_alone(
    world: World, servers: tuple[ProcessUnderTest, ProcessUnderTest], uninterrupted: str
) -> None:
    run = "stopped"
    trainer = world.trainer(*servers, run, run_id=run, steps=STEPS, save_every=100)
    wait_for(lambda: world.steps_done(run) >= 1, within=120, what="first step")
    trainer.signal(signal.SIGTERM)
    assert trainer.wait_exit(within=60) == 143, trainer.log_text()
    stopped_at = world.steps_done(run)
    assert (world.folder / run / "checkpoints" / f"step-{stopped_at:06d}").is_dir()

    killed = world.trainer(*servers, run, "--resume", run_id=run, steps=STEPS)
    wait_for(lambda: world.steps_done(run) > stopped_at, within=120, what="another step")
    killed.kill()
    finish(world, servers, run)

    assert_equal_runs(world, run, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(10))
def test_a_run_killed_at_a_random_moment_ends_like_one_that_was_left_alone(
    world: World, servers: tuple[ProcessUnderTest, ProcessUnderTest], uninterrupted: str, number: int
) -> None:
    moment = random.Random(number)
    run = f"killed-{number}"
    trainer = world.trainer(*servers, run, run_id=run, steps=STEPS, save_every=moment.choice([1, 2]))
    after = moment.randrange(STEPS)
    wait_for(lambda: world.steps_done(run) >= after, within=120, what=f"{after} steps")
    # A random moment is what is tested here, not a wait for something.
    time.sleep(moment.uniform(0.0, 0.6))
    trainer.kill()

    finish(world, servers, run)

    assert_equal_runs(world, run, uninterrupted)
