"""Sequence classifiers of several architectures with random weights and a byte tokenizer, made in milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from tests.support.models import make_byte_tokenizer

EOS_ID = 256
_SPECIAL = {"cls_token": "[CLS]", "sep_token": "[SEP]"}


def with_special_tokens() -> PreTrainedTokenizerFast:
    """A byte tokenizer that writes [CLS] text [SEP] text [SEP], and segments, as BERT's does."""
    tokenizer = make_byte_tokenizer()
    tokenizer.add_special_tokens(_SPECIAL)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", tokenizer.cls_token_id), ("[SEP]", tokenizer.sep_token_id)],
    )
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return tokenizer


def _gpt2(**config: Any) -> PreTrainedModel:
    return GPT2ForSequenceClassification(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **config))


def _bert(**config: Any) -> PreTrainedModel:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return BertForSequenceClassification(BertConfig(**sizes, max_position_embeddings=64, **config))


def _roberta(**config: Any) -> PreTrainedModel:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config["pad_token_id"] = 1
    return RobertaForSequenceClassification(RobertaConfig(**sizes, max_position_embeddings=66, **config))


def _llama(**config: Any) -> PreTrainedModel:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return LlamaForSequenceClassification(LlamaConfig(**sizes, max_position_embeddings=64, **config))


def _xlnet(**config: Any) -> PreTrainedModel:
    return XLNetForSequenceClassification(XLNetConfig(d_model=32, n_layer=2, n_head=4, d_inner=64, **config))


MODELS: dict[str, Callable[..., PreTrainedModel]] = {
    "gpt2": _gpt2,
    "bert": _bert,
    "roberta": _roberta,
    "llama": _llama,
    "xlnet": _xlnet,
}
"""By architecture; all read 64 tokens, but for XLNet, which states no limit."""

_ENCODERS = {"bert", "roberta"}


def make_classifier(
    folder: Path,
    architecture: str = "gpt2",
    *,
    labels: tuple[str, ...] = ("good",),
    seed: int = 0,
    pad_token_id: int | None = EOS_ID,
    chat_template: str | None = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}",
) -> Path:
    """Write a classifier whose weights are wide enough for logits far from 0 and from each other."""
    tokenizer = with_special_tokens() if architecture in _ENCODERS else make_byte_tokenizer()
    tokenizer.chat_template = chat_template
    torch.manual_seed(seed)
    model = MODELS[architecture](
        vocab_size=len(tokenizer),
        initializer_range=0.3,
        pad_token_id=pad_token_id,
        bos_token_id=EOS_ID,
        eos_token_id=EOS_ID,
        id2label=dict(enumerate(labels)),
        label2id={name: index for index, name in enumerate(labels)},
        num_labels=len(labels),
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
