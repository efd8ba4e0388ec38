"""A trainer that is stopped or killed goes on as if nothing had happened."""

from __future__ import annotations

import signal

import pytest

from tests.integration.failures import Judge
from tests.integration.training import (
    EVALUATION,
    STEP,
    World,
    assert_accounted_once,
    assert_finished,
    assert_same_bits,
    metric,
)
from tests.support.processes import wait_for


def assert_equal_runs(world: World, run: str, other: str) -> None:
    assert_same_bits(world, run, other)
    assert_accounted_once(world, run)
    assert world.accounting(run) == world.accounting(other)
    assert world.lines(run, "samples.jsonl") == world.lines(other, "samples.jsonl")
    ours, theirs = (world.lines(name, "metrics.jsonl") for name in (run, other))
    assert [(line["kind"], line["step"]) for line in ours] == [(line["kind"], line["step"]) for line in theirs]


def test_a_run_that_is_stopped_then_killed_ends_like_one_that_was_left_alone(world: World, uninterrupted: str) -> None:
    run = "stopped"
    judge = Judge(world, run, allow=EVALUATION + STEP + 3)
    trainer = world.trainer(run, reward=judge.server, save_every=100)
    judge.holds()
    trainer.signal(signal.SIGTERM)
    judge.allow_all()
    assert trainer.wait_exit(within=60) == 143, trainer.log_text()
    stopped_at = world.steps_done(run)
    assert (world.folder / run / "checkpoints" / f"step-{stopped_at:06d}").is_dir()

    killed = world.trainer(run, "--resume", reward=judge.server)
    wait_for(lambda: world.steps_done(run) > stopped_at, within=120, what="another step")
    killed.kill()
    assert_finished(world.trainer(run, "--resume", reward=judge.server))

    assert_equal_runs(world, run, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize(
    "half_written", ["checkpoints/.partial-step-*", ".partial-model"], ids=["checkpoint", "export"]
)
def test_a_run_killed_while_it_writes_ends_like_one_that_was_left_alone(
    world: World, uninterrupted: str, half_written: str
) -> None:
    # What is written here takes a few milliseconds, which a busy machine may sleep through.
    for attempt in range(6):
        run = f"killed-writing-{half_written.strip('.*').replace('/', '-')}-{attempt}"
        folder = world.folder / run
        trainer = world.trainer(run)
        wait_for((folder / "settings.yaml").exists, within=120, what="begin of the run")
        while trainer.poll() is None and not list(folder.glob(half_written)):
            pass
        trainer.kill()
        if list(folder.glob(half_written)):
            break
    else:
        pytest.fail("six runs wrote faster than this test could kill them")

    assert_finished(world.trainer(run, "--resume"))

    assert_equal_runs(world, run, uninterrupted)
    assert not list(folder.glob(half_written))


@pytest.mark.slow
def test_a_run_killed_while_it_publishes_ends_like_one_that_was_left_alone(world: World, uninterrupted: str) -> None:
    run = "killed-publishing"
    judge = Judge(world, run, allow=EVALUATION + STEP)
    trainer = world.trainer(run, reward=judge.server)

    def times(phase: str) -> float:
        return metric(trainer, "rlhf_trainer_phase_seconds_count", phase=phase)

    def asks_the_policy() -> bool:
        # One call begins where another ends: none is seen three times.
        return any(metric(trainer, "rlhf_trainer_policy_calls_in_flight") > 0 for _ in range(3))

    judge.holds()
    wait_for(lambda: not asks_the_policy(), within=60, what="end of the second step's calls to the policy")
    world.policy.signal(signal.SIGSTOP)  # before the update: its publish can't end
    judge.allow_all()
    try:
        wait_for(lambda: times("learn") >= 2, within=60, what="second update")
        assert times("publish") == 2, "the server was stopped too late: after the publishes of the start and two steps"
        trainer.kill()
    finally:
        world.policy.signal(signal.SIGCONT)

    assert_finished(world.trainer(run, "--resume", reward=judge.server))

    assert_equal_runs(world, run, uninterrupted)
