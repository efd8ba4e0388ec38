"""Tiny random models of many architectures, over the byte tokenizer of tests/support (257 tokens, EOS = 256)."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    MptConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from policy_server.engine.loading import LoadedModels
from policy_server.engine.weights import rehouse
from tests.support.models import make_byte_tokenizer

VOCAB, EOS = 257, 256
COMMON = {"vocab_size": VOCAB, "bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": EOS}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "gpt2": lambda: GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.3, **COMMON),
    "llama": lambda: LlamaConfig(num_key_value_heads=4, **SIZES, **COMMON),
    "mistral": lambda: MistralConfig(num_key_value_heads=2, sliding_window=None, **SIZES, **COMMON),
    "mistral_sliding": lambda: MistralConfig(num_key_value_heads=2, sliding_window=6, **SIZES, **COMMON),
    "qwen2": lambda: Qwen2Config(num_key_value_heads=2, **SIZES, **COMMON),
    "qwen3": lambda: Qwen3Config(num_key_value_heads=2, head_dim=8, **SIZES, **COMMON),
    "gpt_neox": lambda: GPTNeoXConfig(**SIZES, **COMMON),
    "gemma2": lambda: Gemma2Config(
        num_key_value_heads=2, head_dim=8, sliding_window=6, query_pre_attn_scalar=8, **SIZES, **COMMON
    ),
    "gemma3": lambda: Gemma3TextConfig(
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=6,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention"],
        **SIZES,
        **COMMON,
    ),
    "cohere": lambda: CohereConfig(num_key_value_heads=2, logit_scale=0.25, **SIZES, **COMMON),
    "phi": lambda: PhiConfig(num_key_value_heads=2, partial_rotary_factor=0.5, **SIZES, **COMMON),
    "opt": lambda: OPTConfig(
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        word_embed_proj_dim=32,
        init_std=0.3,
        dropout=0.0,
        **COMMON,
    ),
    "bloom": lambda: BloomConfig(hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3, **COMMON),
    # Convolutions beside attention: a cache that can't be merged or trimmed.
    "lfm2": lambda: Lfm2Config(layer_types=["conv", "full_attention"], num_key_value_heads=2, **SIZES, **COMMON),
    "mixtral": lambda: MixtralConfig(num_local_experts=4, num_key_value_heads=2, **SIZES, **COMMON),
    "mpt": lambda: MptConfig(d_model=32, n_layers=2, n_heads=4, max_seq_len=128, initializer_range=0.3, **COMMON),
    "falcon": lambda: FalconConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.3, **COMMON
    ),
}


def make_model(architecture: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model in evaluation mode, its weights where the loader would put them."""
    return model_from(CONFIGS[architecture](), seed=seed, dtype=dtype)


def model_from(config: PreTrainedConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """As make_model."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).to(dtype)
    model.train(False)
    rehouse(model)
    return model


def loaded(model: PreTrainedModel, reference: PreTrainedModel | None = None) -> LoadedModels:
    """What load_models would return for models that are in memory."""
    return LoadedModels(
        policy=model,
        reference=reference if reference is not None else copy.deepcopy(model),
        tokenizer=make_byte_tokenizer(),
        policy_digest="xxh3_128:policy",
        reference_digest="xxh3_128:reference",
    )
