"""LoRA adapters: what is trained, what is written, and who loads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf.fingerprints import weights_digest
from tests.support.models import make_tiny_gpt2
from tests.trainer.learning.support import PAD, make_batch, parameters, same
from tests.trainer.learning.support import load as load_whole
from trainer.adapters import ADAPTER_OFF, base_parameters, without_adapter
from trainer.learning.learner import PPOLearner
from trainer.model import AutoModelForCausalLMWithValueHead
from trainer.ppo.config import PPOConfig

# peft's own model class asks transformers' for something that was renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

IDS = torch.tensor([[72, 101, 108, 108, 111]])
RANK, TARGETS = 4, ["c_attn", "c_fc"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_gpt2(tmp_path_factory.mktemp("base"))


def load(folder: Path, **config: Any) -> AutoModelForCausalLMWithValueHead:
    torch.manual_seed(3)
    peft_config = LoraConfig(**{"r": RANK, "lora_alpha": 8, "target_modules": TARGETS, **config})
    return AutoModelForCausalLMWithValueHead.from_pretrained(
        folder, v_head_init_strategy="normal", peft_config=peft_config
    )


def make(folder: Path, reference: Any = ADAPTER_OFF, **settings: Any) -> PPOLearner:
    config = PPOConfig(**{"batch_size": 8, "mini_batch_size": 4, "learning_rate": 1e-2, **settings})
    return PPOLearner(load(folder), config, reference=reference, tokenizer_pad_id=PAD)


@pytest.fixture(scope="module")
def trained(folder: Path) -> PPOLearner:
    learner = make(folder)
    learner.step(make_batch())
    return learner


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        output = model(IDS)
    result: Tensor = output[0] if isinstance(output, tuple) else output.logits
    return result


def test_a_fresh_adapter_changes_nothing_and_is_all_that_a_step_changes(folder: Path) -> None:
    learner, base = make(folder), AutoModelForCausalLM.from_pretrained(folder)
    digest = weights_digest(base.named_parameters(), torch.float32)
    assert torch.equal(logits(learner.model), logits(base))
    assert weights_digest(learner.policy_parameters(), torch.float32) == digest

    before = parameters(learner)
    learner.step(make_batch())

    moved = {name for name, parameter in parameters(learner).items() if not torch.equal(parameter, before[name])}
    assert all("lora_" in name or name.startswith("v_head") for name in moved)
    assert sum("lora_B" in name for name in moved) == 2 * len(TARGETS)
    assert weights_digest(base_parameters(learner.model.pretrained_model), torch.float32) == digest
    assert not torch.equal(logits(learner.model), logits(base))
    with without_adapter(learner.model):
        assert torch.equal(logits(learner.model), logits(base))


@pytest.mark.parametrize(
    "settings", [{}, {"kl_penalty": "full"}, {"gradient_checkpointing": True}], ids=["kl", "full", "recomputed"]
)
def test_the_policy_without_its_adapter_is_the_reference_that_a_second_model_would_be(
    folder: Path, settings: dict[str, Any]
) -> None:
    own, other = make(folder, **settings), make(folder, load_whole(folder), **settings)

    for step in range(2):
        statistics = [learner.step(make_batch(seed=step)) for learner in (own, other)]

    assert statistics[0]["objective/kl"] == statistics[1]["objective/kl"] != 0
    assert same(parameters(own), parameters(other))
    rows = [torch.tensor([1, 2])], [torch.tensor([3, 4])]
    assert torch.equal(own.reference_logprobs(*rows)[0], other.reference_logprobs(*rows)[0])
    # What a second model would bring is nowhere.
    assert sum(parameter.numel() for parameter in own._reference.parameters()) == 0  # type: ignore[union-attr]


def test_recomputed_activations_make_the_same_adapter(folder: Path) -> None:
    kept, recomputed = make(folder), make(folder, gradient_checkpointing=True)
    for learner in (kept, recomputed):
        learner.step(make_batch())
    for name, parameter in parameters(kept).items():
        torch.testing.assert_close(parameters(recomputed)[name], parameter)


def test_the_optimizer_holds_what_is_trained_alone(trained: PPOLearner) -> None:
    moments = trained.state_dict()["optimizer"]["state"]
    assert len(moments) == 2 * 2 * len(TARGETS) + 2


def test_what_is_published_is_merged_as_peft_merges_it(trained: PPOLearner, folder: Path, tmp_path: Path) -> None:
    trained.save_pretrained(tmp_path)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path).merge_and_unload()

    ours = {name: parameter.to("cpu") for name, parameter in trained.policy_parameters()}

    assert ours.keys() == dict(theirs.named_parameters()).keys()
    assert all(torch.equal(ours[name], parameter) for name, parameter in theirs.named_parameters())
    unchanged = {
        name
        for name, parameter in AutoModelForCausalLM.from_pretrained(folder).named_parameters()
        if torch.equal(ours[name], parameter)
    }
    assert trained.frozen_parameters == unchanged
    assert len(ours) - len(unchanged) == 2 * len(TARGETS)


def test_an_adapter_is_written_alone_and_loads_in_peft_in_transformers_and_here(
    trained: PPOLearner, folder: Path, tmp_path: Path
) -> None:
    trained.save_pretrained(tmp_path)

    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "model.safetensors",
    }
    assert load_file(tmp_path / "model.safetensors").keys() == {"v_head.summary.weight", "v_head.summary.bias"}
    expected = logits(trained.model)
    by_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path)
    assert torch.equal(logits(by_peft.eval()), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), expected)
    here = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    assert torch.equal(logits(here), expected)
    assert same(dict(here.named_parameters()), parameters(trained))
    assert [name for name, parameter in here.named_parameters() if parameter.requires_grad] == [
        name for name, parameter in trained.model.named_parameters() if parameter.requires_grad
    ]
    frozen = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path, is_trainable=False)
    assert not any(parameter.requires_grad for parameter in frozen.pretrained_model.parameters())


def test_a_merged_model_is_written_whole_and_loads_as_any_other(trained: PPOLearner, tmp_path: Path) -> None:
    trained.save_pretrained(tmp_path)
    trained.save_pretrained(tmp_path, merge_adapter=True)

    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    merged = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    assert not merged.is_peft_model
    torch.testing.assert_close(logits(merged), logits(trained.model), rtol=0, atol=1e-4)
    assert torch.equal(merged.v_head.summary.weight, trained.model.v_head.summary.weight)


def test_an_adapter_over_a_merged_model_leaves_no_folder_that_opens_as_the_wrong_one(
    trained: PPOLearner, tmp_path: Path
) -> None:
    trained.save_pretrained(tmp_path, merge_adapter=True)
    trained.save_pretrained(tmp_path)

    assert AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path).is_peft_model


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"target_modules": ["c_fc", "q_prj"]}, "q_prj is no linear layer of GPT2LMHeadModel, which has c_attn, c_fc"),
        ({"target_modules": ["lm_head"]}, "lm_head is no linear layer"),
        ({"target_modules": "transformer.wte"}, "transformer.wte can't be adapted"),
        ({"use_dora": True}, "use_dora: only plain LoRA"),
        ({"bias": "all"}, "bias: only plain LoRA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: only plain LoRA"),
        ({"modules_to_save": ["ln_f"]}, "modules_to_save: only plain LoRA"),
    ],
)
def test_what_is_more_than_plain_lora_is_refused_by_name(folder: Path, config: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        load(folder, **config)


def test_only_a_model_with_an_adapter_can_be_its_own_reference(folder: Path) -> None:
    with pytest.raises(ValueError, match="no adapter that could be off"):
        PPOLearner(load_whole(folder), PPOConfig(), reference=ADAPTER_OFF, tokenizer_pad_id=PAD)


def test_a_model_has_one_adapter(folder: Path) -> None:
    model = load(folder)
    with pytest.raises(ValueError, match="has an adapter already"):
        AutoModelForCausalLMWithValueHead.from_pretrained(model.pretrained_model, peft_config=LoraConfig())


def test_another_models_adapter_is_refused(trained: PPOLearner, tmp_path: Path) -> None:
    trained.save_pretrained(tmp_path / "adapter")
    wider = make_tiny_gpt2(tmp_path / "wider", layers=1)
    with pytest.raises(ValueError, match="is not one of GPT2LMHeadModel"):
        AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "adapter", base_model=str(wider))
