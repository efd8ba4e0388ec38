"""Checkpoints go to TRL 0.11.4 and come from it, tensor for tensor.

`golden/` was written by `trl_side.py save golden`. Tests marked `trl` run TRL itself: TRL_PYTHON is the interpreter
of an environment that holds it.
"""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.models import make_tiny_gpt2
from trainer import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

HERE = Path(__file__).parent
GOLDEN = HERE / "golden"


def run_trl(*arguments: object) -> None:
    interpreter = os.environ.get("TRL_PYTHON")
    if not interpreter:
        pytest.skip("TRL_PYTHON names no interpreter with TRL 0.11.4")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [interpreter, "-W", "ignore", HERE / "trl_side.py", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def merged(model: AutoModelForCausalLMWithValueHead) -> dict[str, torch.Tensor]:
    return {name.removeprefix("pretrained_model."): tensor for name, tensor in model.state_dict().items()}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different


def test_a_checkpoint_made_by_trl_loads_with_every_tensor_equal() -> None:
    stored = load_file(GOLDEN / "model.safetensors")

    model = AutoModelForCausalLMWithValueHead.from_pretrained(GOLDEN)

    held = merged(model)
    assert held.pop("lm_head.weight") is not None  # tied: TRL's file has it once
    assert_same(held, stored)
    assert model.v_head.summary.bias.item() == 0.25


def test_a_checkpoint_made_by_trl_saved_again_has_the_same_tensors(tmp_path: Path) -> None:
    AutoModelForCausalLMWithValueHead.from_pretrained(GOLDEN).save_pretrained(tmp_path)

    assert_same(load_file(tmp_path / "model.safetensors"), load_file(GOLDEN / "model.safetensors"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.n_embd == 16


@pytest.mark.trl
@pytest.mark.parametrize("tie", [True, False])
def test_trl_loads_our_checkpoint_with_every_tensor_equal(tie: bool, tmp_path: Path) -> None:
    ours = AutoModelForCausalLMWithValueHead.from_pretrained(make_tiny_gpt2(tmp_path / "plain", tie=tie))
    ours.save_pretrained(tmp_path / "ours")

    run_trl("load", tmp_path / "ours", tmp_path / "held.safetensors")

    assert_same(load_file(tmp_path / "held.safetensors"), merged(ours))


@pytest.mark.trl
def test_we_load_what_trl_saves_today(tmp_path: Path) -> None:
    run_trl("save", tmp_path / "theirs")
    run_trl("load", tmp_path / "theirs", tmp_path / "held.safetensors")

    ours = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "theirs")

    assert_same(load_file(tmp_path / "held.safetensors"), merged(ours))


@pytest.mark.trl
def test_either_library_continues_the_others_run(tmp_path: Path) -> None:
    def step(folder: Path, out: Path) -> None:
        model = AutoModelForCausalLMWithValueHead.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        trainer = PPOTrainer(PPOConfig(batch_size=1), model, None, tokenizer)
        query, response = (torch.tensor(tokenizer(text).input_ids) for text in ("hello ", "world"))
        trainer.step([query], [response], [torch.tensor(1.0)])
        trainer.save_pretrained(out)

    step(make_tiny_gpt2(tmp_path / "base"), tmp_path / "ours")
    run_trl("step", tmp_path / "ours", tmp_path / "theirs")
    step(tmp_path / "theirs", tmp_path / "ours again")

    folders = ("ours", "theirs", "ours again")
    first, second, third = (load_file(tmp_path / folder / "model.safetensors") for folder in folders)
    assert first.keys() == second.keys() == third.keys()
    for before, after in ((first, second), (second, third)):
        moved = max((after[name] - before[name]).abs().max().item() for name in before)
        assert 0 < moved < 1e-3  # Adam's first steps are of the learning rate's size: nothing was initialised anew
