"""The model with a value head: any causal language model, one file, plain loading."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen2Config,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.support.models import make_tiny_gpt2
from trainer.model import AutoModelForCausalLMWithValueHead, create_reference_model

_SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}
_ONE_KEY = {**_SMALL, "intermediate_size": 32, "num_key_value_heads": 1}

CONFIGS: dict[str, PreTrainedConfig] = {
    "gpt2": GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=2, n_head=2),
    "llama": LlamaConfig(**_ONE_KEY),
    "qwen2, tied": Qwen2Config(**_ONE_KEY, tie_word_embeddings=True),
    "gpt-neox": GPTNeoXConfig(**_SMALL, intermediate_size=32),
    "gemma2, soft cap after the head": Gemma2Config(**_ONE_KEY, head_dim=8),
    "opt, projected and past its own body": OPTConfig(**_SMALL, ffn_dim=32, word_embed_proj_dim=8),
    "bloom, no positions": BloomConfig(vocab_size=40, hidden_size=16, n_layer=2, n_head=2),
}

any_architecture = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def build(config: PreTrainedConfig) -> AutoModelForCausalLMWithValueHead:
    torch.manual_seed(0)
    return AutoModelForCausalLMWithValueHead.from_pretrained(AutoModelForCausalLM.from_config(config))


def same_tensors(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@any_architecture
def test_logits_are_the_language_models_and_values_come_from_its_last_hidden_state(config: PreTrainedConfig) -> None:
    model = build(config)
    ids = torch.arange(14).reshape(2, 7)
    expected = model.pretrained_model(ids, output_hidden_states=True)

    for _ in range(2):  # the first forward finds out which way to the hidden state this architecture allows
        logits, loss, values = model(ids, torch.ones_like(ids), torch.arange(7).expand(2, 7))
        torch.testing.assert_close(logits, expected.logits)
        torch.testing.assert_close(values, model.v_head(expected.hidden_states[-1]))
    assert values.shape == (2, 7)
    assert values.dtype == logits.dtype == torch.float32
    assert loss is None


@any_architecture
def test_logits_only_where_asked_equal_those_of_the_whole_forward(config: PreTrainedConfig) -> None:
    model = build(config)
    ids = torch.arange(14).reshape(2, 7)
    whole, _, values = model(ids)

    last, _, last_values = model(ids, logits_to_keep=3)
    named, _, _ = model(ids, logits_to_keep=torch.tensor([1, 4]))

    torch.testing.assert_close(last, whole[:, -3:])
    torch.testing.assert_close(named, whole[:, [1, 4]])
    torch.testing.assert_close(last_values, values)


@any_architecture
def test_a_saved_folder_loads_plainly_and_with_its_value_head(config: PreTrainedConfig, tmp_path: Path) -> None:
    model = build(config)
    model.save_pretrained(tmp_path)

    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    again = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)

    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    assert same_tensors(plain.state_dict(), model.pretrained_model.state_dict())
    assert same_tensors(again.state_dict(), model.state_dict())
    assert not again.training


def test_saved_weights_may_be_read_by_whoever_may_read_the_config(tmp_path: Path) -> None:
    build(CONFIGS["gpt2"]).save_pretrained(tmp_path)

    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "config.json").stat().st_mode


def test_loading_reports_what_is_missing_but_not_the_value_head_it_restores(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build(CONFIGS["gpt2"]).save_pretrained(tmp_path)
    AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    assert "LOAD REPORT" not in caplog.text

    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["transformer.ln_f.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)

    assert "transformer.ln_f.weight" in caplog.text


def test_tied_embeddings_are_stored_once_and_tied_again_on_loading(tmp_path: Path) -> None:
    model = build(CONFIGS["gpt2"])
    model.save_pretrained(tmp_path)

    names = load_file(tmp_path / "model.safetensors").keys()
    again = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path).pretrained_model

    assert "lm_head.weight" not in names
    assert {"v_head.summary.weight", "v_head.summary.bias", "transformer.wte.weight"} <= names
    assert again.lm_head.weight is again.transformer.wte.weight


def test_labels_give_the_language_modelling_loss_and_the_cache_is_returned_on_request() -> None:
    model = build(CONFIGS["gpt2"])
    ids = torch.arange(8).reshape(1, 8)

    _, loss, _, cache = model(ids, labels=ids, return_past_key_values=True)
    _, _, values = model(ids[:, -1:], past_key_values=cache)

    torch.testing.assert_close(loss, model.pretrained_model(ids, labels=ids).loss)
    assert values.shape == (1, 1)


def test_a_plain_model_gets_a_new_value_head_by_the_strategy_asked_for(tmp_path: Path) -> None:
    make_tiny_gpt2(tmp_path, width=64)
    torch.manual_seed(1)
    head = AutoModelForCausalLMWithValueHead.from_pretrained(
        tmp_path, v_head_init_strategy="normal", v_head_initializer_range=3.0, summary_dropout_prob=0.5
    ).v_head

    assert 2.0 < head.summary.weight.std().item() < 4.0
    assert head.summary.bias.item() == 0.0
    assert head.dropout.p == 0.5
    with pytest.raises(ValueError, match="v_head_init_strategy"):
        AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path, v_head_init_strategy="uniform")


def test_weights_are_fp32_unless_told_and_the_value_head_always(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(CONFIGS["gpt2"]).to(torch.bfloat16).save_pretrained(tmp_path)

    default = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    told = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    logits, _, values = told(torch.tensor([[1, 2]]))

    assert default.pretrained_model.dtype == torch.float32
    assert told.pretrained_model.dtype == torch.bfloat16
    assert told.v_head.summary.weight.dtype == logits.dtype == values.dtype == torch.float32


def test_the_value_head_is_found_in_shards_and_in_pickled_weights(tmp_path: Path) -> None:
    model = build(CONFIGS["gpt2"])
    whole = tmp_path / "whole"
    model.save_pretrained(whole)
    tensors = load_file(whole / "model.safetensors")

    sharded = tmp_path / "sharded"
    sharded.mkdir()
    shards = {
        "model-00001-of-00002.safetensors": {n: t for n, t in tensors.items() if "v_head" not in n},
        "model-00002-of-00002.safetensors": {n: t for n, t in tensors.items() if "v_head" in n},
    }
    for name, shard in shards.items():
        save_file(shard, sharded / name, metadata={"format": "pt"})
    weight_map = {tensor: name for name, shard in shards.items() for tensor in shard}
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    torch.save(tensors, pickled / "pytorch_model.bin")

    for folder in (sharded, pickled):
        (folder / "config.json").write_bytes((whole / "config.json").read_bytes())
        again = AutoModelForCausalLMWithValueHead.from_pretrained(folder)
        assert same_tensors(again.state_dict(), model.state_dict())


def test_saving_over_a_sharded_folder_leaves_one_weights_file_and_foreign_files(tmp_path: Path) -> None:
    model = build(CONFIGS["gpt2"])
    model.pretrained_model.save_pretrained(tmp_path, max_shard_size="10KB")
    (tmp_path / "notes.txt").write_text("mine")
    assert len(list(tmp_path.glob("model-*"))) > 1

    model.save_pretrained(tmp_path)

    assert [path.name for path in tmp_path.glob("model*")] == ["model.safetensors"]
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_save_that_fails_leaves_the_earlier_checkpoint_whole(tmp_path: Path) -> None:
    model = build(CONFIGS["gpt2"])
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model.pretrained_model.register_buffer("unwritable", torch.ones(3, device="meta"))

    with pytest.raises((RuntimeError, ValueError, NotImplementedError)):
        model.save_pretrained(tmp_path)

    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_gathered_state_dict_is_saved_in_place_of_the_modules_own(tmp_path: Path) -> None:
    model = build(CONFIGS["llama"])
    gathered = {name: tensor + 1 for name, tensor in model.state_dict().items()}

    model.save_pretrained(tmp_path / "other", is_main_process=False, state_dict=gathered)
    model.save_pretrained(tmp_path, state_dict=gathered)

    assert not (tmp_path / "other").exists()
    assert same_tensors(AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path).state_dict(), gathered)


def test_a_reference_is_frozen_and_shares_nothing() -> None:
    model = build(CONFIGS["gpt2"])
    reference = create_reference_model(model)

    assert same_tensors(reference.state_dict(), model.state_dict())
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    assert not {p.data_ptr() for p in reference.parameters()} & {p.data_ptr() for p in model.parameters()}


def test_generate_is_the_language_models(tmp_path: Path) -> None:
    model = AutoModelForCausalLMWithValueHead.from_pretrained(make_tiny_gpt2(tmp_path))
    ids = torch.tensor([[5, 6, 7]])
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False, "pad_token_id": 256}

    assert torch.equal(model.generate(ids, **arguments), model.pretrained_model.generate(ids, **arguments))


def test_models_and_arguments_that_cannot_work_are_refused_by_name() -> None:
    encoder_decoder = T5ForConditionalGeneration(
        T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )
    headless = AutoModelForCausalLM.from_config(CONFIGS["gpt2"]).transformer

    with pytest.raises(ValueError, match="encoder-decoder"):
        AutoModelForCausalLMWithValueHead.from_pretrained(encoder_decoder)
    with pytest.raises(ValueError, match="no language model head"):
        AutoModelForCausalLMWithValueHead.from_pretrained(headless)
    with pytest.raises(ValueError, match="peft_config is a LoraConfig, not object"):
        AutoModelForCausalLMWithValueHead.from_pretrained(
            build(CONFIGS["gpt2"]).pretrained_model,
            peft_config=object(),  # type: ignore[arg-type]
        )
    with pytest.raises(ValueError, match="reward_adapter"):
        AutoModelForCausalLMWithValueHead.from_pretrained("anything", reward_adapter="x")
    with pytest.raises(ValueError, match="built already"):
        AutoModelForCausalLMWithValueHead.from_pretrained(build(CONFIGS["gpt2"]).pretrained_model, dtype="auto")
    with pytest.raises(ValueError, match="not int"):
        AutoModelForCausalLMWithValueHead.from_pretrained(3)
