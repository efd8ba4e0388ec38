"""Rollouts that run ahead of the learner: what is recorded of their versions, and what a stop leaves of them."""

from __future__ import annotations

import json
import signal
import statistics

import pytest

from tests.integration.failures import Judge, steps_made, waits_for
from tests.integration.training import EVALUATION, STEP, World, assert_accounted_once, assert_finished
from tests.support.processes import wait_for

STEPS = 4
SEEDS = (1, 2, 3)

PRINTABLE = '''
def reward(prompts, completions, **columns):
    """The share of printable ASCII, a third of what the untrained model writes."""
    return [sum(each.isascii() and each.isprintable() for each in text) / (1 + len(text)) for text in completions]
'''


@pytest.fixture(scope="session")
def finished(world: World) -> str:
    """The name of a run that was one version ahead of itself."""
    assert_finished(world.trainer("ahead", reproducible=False, max_staleness=1, steps=STEPS))
    return "ahead"


def test_no_token_is_staler_than_allowed_and_every_sample_has_its_versions(world: World, finished: str) -> None:
    assert_accounted_once(world, finished)
    lines = world.lines(finished, "accounting.jsonl")
    assert [line["outcome"] for line in lines] == ["trained"] * STEPS * STEP
    for line in lines:
        trained_at = line["step"] - 1
        assert line["versions"] == sorted(line["versions"])
        assert trained_at - 1 <= line["versions"][0] <= line["versions"][-1] <= trained_at
    assert any(line["versions"][0] < line["step"] - 1 for line in lines), "no rollout ran ahead"


def test_every_step_says_how_stale_it_was_and_how_its_tokens_were_weighed(world: World, finished: str) -> None:
    lines = world.lines(finished, "accounting.jsonl")
    steps = world.lines(finished, "metrics.jsonl", "step")
    for step in steps:
        staleness = [step["step"] - 1 - line["versions"][0] for line in lines if line["step"] == step["step"]]
        assert step["rollout/staleness_max"] == max(staleness)
        assert step["rollout/staleness_mean"] == pytest.approx(sum(staleness) / len(staleness))
        assert 0 < step["ppo/policy/importance_weight_mean"] <= 2
        assert 0 <= step["ppo/policy/importance_clipped"] <= 1
    assert steps[0]["rollout/staleness_max"] == 0
    assert steps[0]["ppo/policy/importance_weight_mean"] == pytest.approx(1, abs=1e-3)
    assert max(step["rollout/staleness_max"] for step in steps) == 1
    stale = [step for step in steps if step["rollout/staleness_mean"] > 0]
    assert any(abs(step["ppo/policy/importance_weight_mean"] - 1) > 1e-3 for step in stale)


def test_prompts_of_rollouts_that_a_stop_threw_away_are_drawn_again(world: World) -> None:
    ahead = {"reproducible": False, "max_staleness": 2, "steps": STEPS}
    judge = Judge(world, "ahead-stopped", allow=EVALUATION + 2 * STEP)  # of several steps, in no order
    trainer = world.trainer("ahead-stopped", reward=judge.server, save_every=100, **ahead)
    judge.holds()
    steps_made(world, "ahead-stopped", 1)
    trainer.signal(signal.SIGTERM)
    judge.allow_all()
    assert trainer.wait_exit(within=60) == 143, trainer.log_text()
    stopped_at = world.steps_done("ahead-stopped")
    assert len(world.lines("ahead-stopped", "accounting.jsonl")) == stopped_at * STEP

    again = world.trainer("ahead-stopped", "--resume", reward=judge.server, save_every=1, **ahead)
    wait_for(lambda: world.steps_done("ahead-stopped") > stopped_at, within=120, what="another step")
    again.kill()
    assert_finished(world.trainer("ahead-stopped", "--resume", reward=judge.server, **ahead))

    assert_accounted_once(world, "ahead-stopped")
    assert len(world.lines("ahead-stopped", "accounting.jsonl")) == STEPS * STEP


def test_a_policy_server_killed_while_the_learner_learns_gets_whole_weights(world: World) -> None:
    judge = Judge(world, "ahead-killed", allow=EVALUATION + 2 * STEP)
    trainer = world.trainer("ahead-killed", reward=judge.server, reproducible=False, max_staleness=1, steps=STEPS)
    judge.holds()
    steps_made(world, "ahead-killed", 1)
    world.policy.kill()
    judge.allow_all()
    waits_for(trainer, "policy")
    world.restart_policy()

    assert_finished(trainer)
    assert_accounted_once(world, "ahead-killed")
    assert all(line["rollout/staleness_max"] <= 1 for line in world.lines("ahead-killed", "metrics.jsonl", "step"))


@pytest.mark.slow
@pytest.mark.timeout(1800)  # six runs, on a machine that may do other work
def test_rollouts_that_run_ahead_learn_as_much_as_synchronous_ones(world: World) -> None:
    reward = world.reward_server(PRINTABLE, name="printable")
    # Whose rows share a batch.
    policy = world.start("policy_server", "--model", str(world.model), "--threads", "1", "--managed")
    policy.wait_serving("rlhf.weights.v1.WeightsService")
    held_out = world.folder / "held_out.jsonl"
    held_out.write_text("".join(json.dumps({"prompt": f"The play {row} was"}) + "\n" for row in range(64)))

    def rewards(max_staleness: int, seed: int) -> tuple[float, float]:
        """Of the held-out prompts, before and after."""
        run = f"curve-{max_staleness}-{seed}"
        trainer = world.trainer(
            run,
            reproducible=False,
            reward=reward,
            policy_server=policy.address,
            eval_data=held_out,
            seed=seed,
            max_staleness=max_staleness,
            steps=30,
            batch_size=32,
            mini_batch_size=8,
            max_new_tokens=16,
            init_kl_coef=0.01,
            eval_every=30,
            eval_prompts=64,
            save_every=30,
            rollout_concurrency=32,
        )
        assert trainer.wait_exit(within=600) == 0, trainer.log_text()[-4000:]
        before, after = world.lines(run, "metrics.jsonl", "evaluation")
        return before["reward_mean"], after["reward_mean"]

    curves = {staleness: [rewards(staleness, seed) for seed in SEEDS] for staleness in (0, 1)}
    ends = [[after for _, after in curve] for curve in curves.values()]
    noise = sum(max(each) - min(each) for each in ends)
    synchronous, ahead = map(statistics.fmean, ends)
    assert abs(ahead - synchronous) <= noise, curves
    assert min(synchronous, ahead) - curves[0][0][0] > noise / 2, curves
