"""A whole run over three real processes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.integration.training import (
    STEP,
    World,
    assert_accounted_once,
    assert_finished,
    assert_same_bits,
    metric,
    published,
)
from tests.support.processes import wait_for
from trainer.model import AutoModelForCausalLMWithValueHead
from trainer.run.checkpoints import exported_step

# Evaluation at 0, steps 1 and 2, evaluation at 2: 24 samples. Those of step 3 wait until the test has read the metrics.
GATED = """
import pathlib, time
GATE = pathlib.Path(__file__).with_name("gate")
scored = 0
def reward(prompts, completions, completion_ids, stars, **columns):
    global scored
    while scored >= 24 and not GATE.exists():
        time.sleep(0.01)
    scored += len(completions)
    assert all(prompt.startswith("The film") for prompt in prompts)
    assert all(isinstance(each, int) for each in stars)
    return [len(set(ids)) / len(ids) for ids in completion_ids]
"""
# Samples 20 to 23 are the held-out ones after step 2.
BEST_AT_TWO = """
scored = 0
def reward(prompts, completions, **columns):
    global scored
    scored += len(completions)
    return [float(20 < number <= 24) for number in range(scored - len(completions) + 1, scored + 1)]
"""
STEPS = 3


@pytest.fixture(scope="session")
def finished(world: World) -> tuple[World, dict[str, float]]:
    """A run of three steps that has ended, and what its metrics endpoint said after the second."""
    reward = world.reward_server(GATED, name="gated")
    before = published(world.policy)
    trainer = world.trainer("run", reward=reward, steps=STEPS)

    def trained() -> float:
        return metric(trainer, "rlhf_trainer_samples_trained_total")

    # What a step's metrics end with.
    wait_for(lambda: trained() == 2 * STEP, within=120, what="second step")
    names = ("step", "objective_kl", "ppo_loss_total", "ppo_mean_scores", "weights_version", "incarnation")
    seen = {name: metric(trainer, f"rlhf_trainer_{name}") for name in names}
    seen["trained"] = trained()
    seen["waiting"] = metric(trainer, "rlhf_trainer_waiting")
    seen["rollouts timed"] = metric(trainer, "rlhf_trainer_phase_seconds_count", phase="rollout")
    seen["publishes at the server"] = published(world.policy) - before
    (world.folder / "gate").touch()
    assert_finished(trainer)
    return world, seen


def test_metrics_tell_where_the_run_is(finished: tuple[World, dict[str, float]]) -> None:
    world, seen = finished
    second = world.lines("run", "metrics.jsonl", "step")[1]

    assert seen["step"] == 2
    assert seen["weights_version"] == 2
    assert seen["incarnation"] == 1
    assert seen["trained"] == 2 * STEP
    assert seen["waiting"] == 0
    assert seen["rollouts timed"] == 2
    assert seen["publishes at the server"] == 3
    assert seen["objective_kl"] == second["objective/kl"]
    assert seen["ppo_loss_total"] == second["ppo/loss/total"]
    assert seen["ppo_mean_scores"] == second["ppo/mean_scores"]


def test_the_final_model_and_every_checkpoint_load_plainly(finished: tuple[World, dict[str, float]]) -> None:
    world, _ = finished
    run = world.folder / "run"

    for folder in (run / "model", *(run / "checkpoints").iterdir()):
        AutoModelForCausalLM.from_pretrained(folder)
        AutoTokenizer.from_pretrained(folder)
        head = AutoModelForCausalLMWithValueHead.from_pretrained(folder).v_head.summary.weight
        assert torch.isfinite(head).all()
    start = AutoModelForCausalLM.from_pretrained(world.model)
    trained = AutoModelForCausalLM.from_pretrained(run / "model")
    assert not torch.equal(start.transformer.wte.weight, trained.transformer.wte.weight)


def test_numbers_and_samples_are_written_for_every_step_and_evaluation(
    finished: tuple[World, dict[str, float]],
) -> None:
    world, _ = finished
    evaluations = world.lines("run", "metrics.jsonl", "evaluation")

    assert [line["step"] for line in world.lines("run", "metrics.jsonl", "step")] == [1, 2, 3]
    assert [line["step"] for line in evaluations] == [0, 2, 3]
    assert abs(evaluations[0]["kl_mean"]) < 1e-4
    assert evaluations[-1]["kl_mean"] > 0.01
    assert {"reward_mean", "kl_mean", "distinct_fraction", "length_mean"} <= evaluations[0].keys()
    samples = world.lines("run", "samples.jsonl", "evaluation")
    assert len(samples) == 3 * 4
    assert {sample["prompt"] for sample in samples[:4]} == {sample["prompt"] for sample in samples[-4:]}
    assert all(isinstance(sample["reward"], float) and sample["completion"] for sample in samples)


def test_every_prompt_is_accounted_once_and_none_is_held_out(finished: tuple[World, dict[str, float]]) -> None:
    world, _ = finished

    assert_accounted_once(world, "run")
    lines = world.lines("run", "accounting.jsonl")
    assert [line["outcome"] for line in lines] == ["trained"] * STEPS * STEP
    held_out = {sample["prompt"] for sample in world.lines("run", "samples.jsonl", "evaluation")}
    assert held_out.isdisjoint(f"The film {line['row']} was" for line in lines)


def test_the_best_evaluations_checkpoint_and_model_are_kept_beside_the_newest(world: World) -> None:
    reward = world.reward_server(BEST_AT_TWO, name="best")

    assert_finished(world.trainer("best", reward=reward, steps=4, save_every=100, keep_checkpoints=1))

    run = world.folder / "best"
    evaluations = world.lines("best", "metrics.jsonl", "evaluation")
    assert {line["step"]: line["reward_mean"] for line in evaluations} == {0: 0.0, 2: 1.0, 4: 0.0}
    assert {folder.name for folder in (run / "checkpoints").iterdir()} == {"step-000002", "step-000004"}
    assert (exported_step(run / "best"), exported_step(run / "model")) == (2, 4)
    best, then, last = (
        load_file(folder / "model.safetensors")
        for folder in (run / "best", run / "checkpoints" / "step-000002", run / "model")
    )
    assert all(torch.equal(best[name], tensor) for name, tensor in then.items())
    assert any(not torch.equal(best[name], tensor) for name, tensor in last.items())
    AutoModelForCausalLM.from_pretrained(run / "best")


def test_weights_that_go_through_files_train_to_the_same_bits(world: World, uninterrupted: str) -> None:
    trainer = world.trainer("through files", run_id="files", weights_folder=world.weights_folder)
    assert_finished(trainer)

    assert_same_bits(world, "through files", uninterrupted)
    assert not list(world.weights_folder.iterdir())
    assert "reads no folder" not in trainer.log_text()


def test_a_finished_run_has_nothing_to_resume_and_needs_no_server(finished: tuple[World, dict[str, float]]) -> None:
    world, _ = finished

    again = world.trainer("run", "--resume", steps=STEPS, policy_server="127.0.0.1:1", reward_server="127.0.0.1:1")

    assert_finished(again)
    assert len(world.lines("run", "metrics.jsonl", "step")) == STEPS
