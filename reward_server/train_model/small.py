"""A small classifier to train from scratch: words that are looked up, one layer of attention, and their mean.

Some ten thousand short texts teach a model little beyond which words please, so a mean over tokens learns more from
them than a deep model that has to find out first where to look.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ModernBertConfig, PreTrainedTokenizerFast

_PAD, _BEGIN, _END, _MASK = "<pad>", "<s>", "</s>", "<mask>"
_SPECIAL = [_PAD, _BEGIN, _END, _MASK]

_VOCABULARY = 8000
_WIDTH = 128


def train_tokenizer(texts: Sequence[str], max_tokens: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of lower-cased text, which knows no text that it cannot write."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    # With a space before the first word too, a word is the same token wherever it stands.
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        min_frequency=2,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{_BEGIN} $A {_END}",
        pair=f"{_BEGIN} $A {_END} $B {_END}",
        special_tokens=[(token, _SPECIAL.index(token)) for token in (_BEGIN, _END)],
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        pad_token=_PAD,
        bos_token=_BEGIN,
        eos_token=_END,
        cls_token=_BEGIN,
        sep_token=_END,
        mask_token=_MASK,
        model_max_length=max_tokens,
    )


def small_config(tokenizer: PreTrainedTokenizerFast, max_tokens: int, **labels: Any) -> ModernBertConfig:
    """ModernBERT with a mean instead of a first token, and dropout where a small corpus needs it."""
    return ModernBertConfig(
        vocab_size=len(tokenizer),
        hidden_size=_WIDTH,
        intermediate_size=2 * _WIDTH,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=max_tokens,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        cls_token_id=tokenizer.cls_token_id,
        sep_token_id=tokenizer.sep_token_id,
        classifier_pooling="mean",
        norm_bias=True,
        classifier_bias=True,
        embedding_dropout=0.5,
        attention_dropout=0.1,
        mlp_dropout=0.1,
        classifier_dropout=0.3,
        **labels,
    )
