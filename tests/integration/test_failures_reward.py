"""A reward server that is down, slow, late, flaky or wrong costs time, never a sample and never a made-up score."""

from __future__ import annotations

import signal

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.failures import Judge, assert_nothing_lost, steps_made, waits_for
from tests.integration.training import (
    EVALUATION,
    STEP,
    World,
    assert_accounted_once,
    assert_finished,
    assert_same_bits,
    published,
)
from tests.support.judge import Manner
from tests.support.proxy import Proxy

# Every call is PENDING the first time; then a fifth of the rows is ABSTAINED and a fifth FAILED (not a number).
PICKY = """
import math
from reward_server.results import RetryLater
calls = 0
def reward(prompts, completions, **columns):
    global calls
    calls += 1
    if calls % 2:
        raise RetryLater(0.05, "the judge is out")
    return [{1: None, 2: math.nan}.get(int(prompt.split()[2]) % 5, 0.5) for prompt in prompts]
"""
NOTHING = """
def reward(prompts, completions, **columns):
    return [None] * len(prompts)
"""


def test_three_failed_calls_of_ten_cost_time_alone(world: World, uninterrupted: str) -> None:
    judge = Judge(world, "flaky", Manner.FLAKY)

    assert_finished(world.trainer("flaky", reward=judge.server))

    assert_same_bits(world, "flaky", uninterrupted)
    assert_nothing_lost(world, "flaky", judge)


def test_an_answer_after_the_deadline_counts_for_nothing(world: World) -> None:
    judge = Judge(world, "late", Manner.DRIFTING, allow=EVALUATION + STEP)
    with Proxy(judge.server.address) as line:
        trainer = world.trainer("late", reward=judge.server, reward_server=line.address, reward_timeout=6.0)
        judge.holds()
        line.delay_seconds = 7.0
        judge.allow_all()
        waits_for(trainer, "reward")
        line.delay_seconds = 0
        assert_finished(trainer)

    given = judge.given("late")
    assert len(given) > len(dict(given)), "no answer was late"
    assert_nothing_lost(world, "late", judge, asked_once=False)
    assert "DEADLINE_EXCEEDED" in trainer.log_text()


@pytest.mark.slow
def test_a_reward_server_that_stands_still_is_waited_for(world: World, uninterrupted: str) -> None:
    judge = Judge(world, "still", allow=EVALUATION + STEP)
    trainer = world.trainer("still", reward=judge.server, reward_timeout=1.0)
    judge.holds()
    judge.server.signal(signal.SIGSTOP)
    judge.allow_all()
    waits_for(trainer, "reward")
    judge.server.signal(signal.SIGCONT)

    assert_finished(trainer)
    assert_same_bits(world, "still", uninterrupted)
    assert_nothing_lost(world, "still", judge, asked_once=False)


@pytest.mark.parametrize(
    "manner",
    [
        Manner.NOT_A_NUMBER,
        *(
            pytest.param(manner, marks=pytest.mark.slow)
            for manner in (Manner.LEAVES_ONE_OUT, Manner.ANSWERS_ONE_TWICE, Manner.ANSWERS_A_STRANGER)
        ),
    ],
)
def test_a_malformed_answer_ends_the_run_by_name_and_a_mended_server_goes_on(
    world: World, uninterrupted: str, manner: Manner
) -> None:
    run = manner.value
    judge = Judge(world, run, allow=EVALUATION + STEP)
    trainer = world.trainer(run, reward=judge.server)
    steps_made(world, run, 1)
    judge.server.kill()
    judge.allow_all()
    judge.restart(manner)

    assert trainer.wait_exit(within=120) == 1
    assert f"reward server {judge.server.address}" in trainer.log_text()
    assert f"{run}/" in trainer.log_text().rpartition("the run stops")[2], "the sample is named"
    judge.restart()
    assert_finished(world.trainer(run, "--resume", reward=judge.server))
    assert_same_bits(world, run, uninterrupted)
    assert_accounted_once(world, run)


def test_a_reward_server_killed_in_mid_run_is_waited_for(world: World, uninterrupted: str) -> None:
    judge = Judge(world, "killed", allow=EVALUATION + STEP + 3)
    trainer = world.trainer("killed", reward=judge.server)
    judge.holds()
    judge.server.kill()
    waits_for(trainer, "reward")
    judge.allow_all()
    judge.restart()

    assert_finished(trainer)
    assert_same_bits(world, "killed", uninterrupted)
    assert_nothing_lost(world, "killed", judge)
    assert "waiting for the reward server" in trainer.log_text()


def test_rewards_that_are_pending_abstained_or_not_numbers_never_enter_a_batch(world: World) -> None:
    assert_finished(world.trainer("picky", reward=world.reward_server(PICKY, name="picky"), steps=2, batch_size=16))

    assert_accounted_once(world, "picky")
    lines = world.lines("picky", "accounting.jsonl")
    reasons = {1: "abstained", 2: "failed"}
    assert [line.get("reason") for line in lines] == [reasons.get(line["row"] % 5) for line in lines]
    for step in world.lines("picky", "metrics.jsonl", "step"):
        trained = [line for line in lines if line["step"] == step["step"] and line["outcome"] == "trained"]
        assert step["samples/trained"] == len(trained)
        assert step["samples/dropped"] == 16 - len(trained)
        assert step["ppo/mean_scores"] == 0.5


def test_steps_without_a_sample_change_no_weights_and_publish_nothing(world: World) -> None:
    before = published(world.policy)

    assert_finished(
        world.trainer("nothing", reward=world.reward_server(NOTHING, name="nothing"), steps=2, eval_prompts=0)
    )

    assert [line["weights_version"] for line in world.lines("nothing", "metrics.jsonl", "step")] == [0, 0]
    assert published(world.policy) == before + 1
    start = load_file(world.model / "model.safetensors")
    end = world.final_parameters("nothing")
    assert all(torch.equal(end[name], start[name]) for name in start)
