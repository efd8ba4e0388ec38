from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.fingerprints import tokenizer_digest, weights_digest
from tests.support.models import make_byte_tokenizer, make_tiny_gpt2


def _weights() -> dict[str, torch.Tensor]:
    return {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(1.5)}


DIGEST = weights_digest(_weights().items(), torch.float32)


def test_a_digest_of_weights_names_its_algorithm() -> None:
    name, _, digits = DIGEST.partition(":")
    assert name == "xxh3_128"
    assert len(digits) == 32


def test_order_and_layout_of_weights_do_not_matter() -> None:
    weights = _weights()
    turned = weights["a"].T.contiguous().T

    assert weights_digest([("b", weights["b"]), ("a", turned)], torch.float32) == DIGEST


def test_weights_are_compared_in_one_dtype() -> None:
    doubles = [(name, tensor.double()) for name, tensor in _weights().items()]

    assert weights_digest(doubles, torch.float32) == DIGEST
    assert weights_digest(_weights().items(), torch.bfloat16) != DIGEST


@pytest.mark.parametrize(
    "changed",
    [
        {"a": torch.arange(6.0).reshape(3, 2), "b": torch.tensor(1.5)},
        {"a": torch.arange(6.0).reshape(2, 3), "c": torch.tensor(1.5)},
        {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1.5])},
        {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(1.5000001)},
        {"a": torch.arange(6.0).reshape(2, 3)},
    ],
    ids=["shape", "name", "scalar", "value", "missing"],
)
def test_any_other_weights_have_another_digest(changed: dict[str, torch.Tensor]) -> None:
    assert weights_digest(changed.items(), torch.float32) != DIGEST


def test_a_model_saved_and_loaded_has_the_same_digests(tmp_path: Path) -> None:
    make_tiny_gpt2(tmp_path / "a")
    first = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    first.save_pretrained(tmp_path / "b")
    AutoTokenizer.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    second = AutoModelForCausalLM.from_pretrained(tmp_path / "b")

    digests = {weights_digest(model.named_parameters(), torch.float32) for model in (first, second)}
    tokenizers = {tokenizer_digest(AutoTokenizer.from_pretrained(tmp_path / name)) for name in "ab"}

    assert len(digests) == len(tokenizers) == 1
    assert tokenizers.pop().startswith("sha256:")


def test_padding_and_truncation_do_not_change_a_tokenizer() -> None:
    tokenizer = make_byte_tokenizer()
    before = tokenizer_digest(tokenizer)

    tokenizer(["a", "long text"], padding=True, truncation=True, max_length=4)
    tokenizer.padding_side = "left"

    assert tokenizer_digest(tokenizer) == before


def test_choosing_a_padding_token_does_not_change_a_tokenizer() -> None:
    plain, padded = make_byte_tokenizer(), make_byte_tokenizer()
    plain.pad_token = None
    padded.pad_token = padded.eos_token

    assert tokenizer_digest(plain) == tokenizer_digest(padded)


def test_what_changes_ids_or_text_changes_the_digest() -> None:
    digests = {tokenizer_digest(make_byte_tokenizer()), tokenizer_digest(make_byte_tokenizer(chat_template=None))}
    with_token = make_byte_tokenizer()
    with_token.add_tokens(["<new>"])
    with_bos = make_byte_tokenizer()
    with_bos.bos_token = with_bos.eos_token

    assert len(digests | {tokenizer_digest(with_token), tokenizer_digest(with_bos)}) == 4
