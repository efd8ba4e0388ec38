"""A run that trains a LoRA adapter, over real processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.integration.training import World, assert_finished, assert_same_bits
from tests.support.processes import wait_for

LORA = {"lora_rank": 4, "lora_targets": "c_attn,c_fc", "reference": "trainer", "learning_rate": 3e-3, "steps": 3}


@pytest.fixture(scope="session")
def finished(world: World) -> Path:
    """The folder of a finished run."""
    assert_finished(world.trainer("lora", **LORA))
    return world.folder / "lora"


def test_the_server_gets_the_adapter_merged_and_the_frozen_weights_once(world: World, finished: Path) -> None:
    steps = world.lines("lora", "metrics.jsonl", "step")

    # It samples with what the trainer computes with, in every step.
    assert max(step["rollout/logprob_gap_max"] for step in steps) < 1e-3
    assert abs(steps[-1]["objective/kl"]) > 1e-3
    assert steps[0]["objective/kl"] == pytest.approx(0.0, abs=1e-4)


# peft's own model class asks transformers' for something that was renamed.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_a_checkpoint_holds_what_is_trained_and_the_finished_model_is_whole(world: World, finished: Path) -> None:
    last = finished / "checkpoints" / "step-000003"
    base = AutoModelForCausalLM.from_pretrained(world.model)
    whole = (world.model / "model.safetensors").stat().st_size

    assert load_file(last / "model.safetensors").keys() == {"v_head.summary.weight", "v_head.summary.bias"}
    assert (last / "adapter_model.safetensors").stat().st_size < whole / 5
    optimizer = torch.load(last / "learner.pt", weights_only=True)["learner"]["optimizer"]["state"]
    assert len(optimizer) == 2 * 2 * 2 + 2  # two matrices in two layers of two blocks; the value head
    merged = PeftModel.from_pretrained(base, last).merge_and_unload()
    model = AutoModelForCausalLM.from_pretrained(finished / "model")
    assert all(torch.equal(ours, model.get_parameter(name)) for name, ours in merged.named_parameters())


@pytest.mark.slow
def test_a_killed_run_ends_like_one_that_was_left_alone_and_may_leave_the_adapter_alone_behind(
    world: World, finished: Path
) -> None:
    trainer = world.trainer("lora-killed", **LORA)
    wait_for(lambda: world.steps_done("lora-killed") >= 2, within=120, what="second step")
    trainer.kill()
    assert_finished(world.trainer("lora-killed", "--resume", **LORA))
    assert_same_bits(world, "lora-killed", "lora")

    trainer = world.trainer("lora-alone", **LORA, lora_export="adapter")
    wait_for(lambda: world.steps_done("lora-alone") >= 1, within=120, what="first step")
    trainer.kill()
    assert_finished(world.trainer("lora-alone", "--resume", **LORA, lora_export="adapter"))
    ours, theirs = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (world.folder / "lora-alone" / "model", finished / "checkpoints" / "step-000003")
    )
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
