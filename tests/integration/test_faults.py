"""Servers that die, and rewards that don't score, cost a run nothing but time."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from tests.integration.training import (
    World,
    assert_accounted_once,
    assert_finished,
    assert_same_bits,
    metric,
    published,
)
from tests.support.processes import ProcessUnderTest, wait_for

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
# Something lies in the way of checkpoints until 17 samples are scored, or for good.
BLOCKING = """
import pathlib
OBSTACLE = pathlib.Path(__file__).parent / "RUN" / "checkpoints" / ".partial-obstacle"
scored = 0
def reward(prompts, completions, **columns):
    global scored
    scored += len(completions)
    OBSTACLE.parent.mkdir(parents=True, exist_ok=True)
    if FOR_GOOD or scored < 17:
        OBSTACLE.touch()
    else:
        OBSTACLE.unlink(missing_ok=True)
    return [0.5] * len(completions)
"""


def generated(policy: ProcessUnderTest) -> float:
    return metric(policy, "grpc_server_handled_total", grpc_method="Generate", grpc_code="OK")


def test_both_servers_killed_and_restarted_in_mid_run_change_nothing(world: World, uninterrupted: str) -> None:
    trainer = world.trainer("disturbed")
    wait_for(lambda: world.steps_done("disturbed") >= 1, within=120, what="first step")
    answered = generated(world.policy)
    wait_for(lambda: generated(world.policy) >= answered + 2, within=60, what="rollouts of the second step")
    world.policy.kill()
    wait_for(lambda: metric(trainer, "rlhf_trainer_waiting", on="policy") == 1, within=60, what="wait for the policy")
    world.restart_policy()
    wait_for(lambda: world.steps_done("disturbed") >= 2, within=120, what="second step")

    world.reward.kill()
    wait_for(lambda: metric(trainer, "rlhf_trainer_waiting", on="reward") == 1, within=60, what="wait for the reward")
    world.restart_reward()

    assert_finished(trainer)
    assert_same_bits(world, "disturbed", uninterrupted)
    assert_accounted_once(world, "disturbed")
    assert "waiting for the policy server" in trainer.log_text()
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
    world.policy.wait_bound()
    before = published(world.policy)

    assert_finished(
        world.trainer("nothing", reward=world.reward_server(NOTHING, name="nothing"), steps=2, eval_prompts=0)
    )

    assert [line["weights_version"] for line in world.lines("nothing", "metrics.jsonl", "step")] == [0, 0]
    assert published(world.policy) == before + 1
    start = load_file(world.model / "model.safetensors")
    end = world.final_parameters("nothing")
    assert all(torch.equal(end[name], start[name]) for name in start)


def test_checkpoints_that_fail_are_written_later_and_the_run_goes_on(world: World) -> None:
    source = BLOCKING.replace("RUN", "blocked").replace("FOR_GOOD", "False")
    reward = world.reward_server(source, name="blocking")
    trainer = world.trainer("blocked", reward=reward, eval_prompts=0, save_every=2)
    assert_finished(trainer)

    steps = [folder.name for folder in sorted((world.folder / "blocked" / "checkpoints").iterdir())]
    assert steps == ["step-000003", "step-000004", "step-000005"]
    assert trainer.log_text().count("tries again after the next step") == 1


def test_the_third_checkpoint_that_fails_in_a_row_stops_the_run(world: World) -> None:
    source = BLOCKING.replace("RUN", "blocked-for-good").replace("FOR_GOOD", "True")
    reward = world.reward_server(source, name="blocking_for_good")
    trainer = world.trainer("blocked-for-good", reward=reward, eval_prompts=0)

    assert trainer.wait_exit(within=120) == 1
    assert world.steps_done("blocked-for-good") == 3
