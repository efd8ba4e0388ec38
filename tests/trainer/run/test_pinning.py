"""A run holds its servers to what it needs and began with, and says what differs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from trainer.clients.policy import ModelInfo
from trainer.run.checkpoints import Pins
from trainer.run.pinning import Needs, PinError, check_pins, check_served_model, same_weights
from trainer.versions import WeightsVersion

PINS = Pins("xxh3_128:aa", "sha256:bb", "1")
SERVED = ModelInfo(
    model="policy",
    weights=WeightsVersion(),
    weights_digest="xxh3_128:aa",
    serving_dtype="bfloat16",
    tokenizer_digest="sha256:bb",
    vocab_size=257,
    eos_token_ids=(),
    max_context_tokens=128,
    max_message_bytes=0,
    max_log_probs_tokens=0,
    processed_logprobs=True,
)
NEEDS = Needs(tokenizer_digest="sha256:bb", logit_columns=257, context_tokens=128)


def test_a_server_of_the_same_model_passes() -> None:
    check_served_model(SERVED, NEEDS, target="here")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("tokenizer_digest", "sha256:cc", "server here has another tokenizer"),
        ("vocab_size", 300, "300 logit columns, the trainer's --model 257"),
        ("max_context_tokens", 64, "takes 64 tokens .* may need 128: lower --max-prompt-tokens"),
        ("processed_logprobs", False, "LOG_PROB_KIND_PROCESSED"),
    ],
)
def test_a_server_that_does_not_fit_is_refused_with_what_differs(field: str, value: Any, message: str) -> None:
    with pytest.raises(PinError, match=message):
        check_served_model(replace(SERVED, **{field: value}), NEEDS, target="here")


def test_what_the_run_began_with_passes() -> None:
    check_pins(PINS, owner="policy server host:1", reference_digest="xxh3_128:aa", tokenizer_digest="sha256:bb")


def test_a_reference_of_a_trained_folder_is_refused_because_the_kl_would_begin_again() -> None:
    with pytest.raises(PinError, match=r"of policy server host:1 .* the KL would silently start again"):
        check_pins(
            PINS, owner="policy server host:1", reference_digest="xxh3_128:trained", tokenizer_digest="sha256:bb"
        )


def test_another_tokenizer_is_refused() -> None:
    with pytest.raises(PinError, match="not the one that this run began with"):
        check_pins(PINS, owner="policy server host:1", reference_digest="xxh3_128:aa", tokenizer_digest="sha256:cc")


def test_weights_are_compared_in_the_type_that_they_are_served_in() -> None:
    digests = {torch.float32: "xxh3_128:bb", torch.bfloat16: "xxh3_128:aa"}

    assert same_weights(SERVED, digests.__getitem__)
    assert same_weights(replace(SERVED, serving_dtype="float32"), digests.__getitem__) is False


@pytest.mark.parametrize("theirs", [{"serving_dtype": "int8"}, {"serving_dtype": "awq"}, {"weights_digest": "md5:aa"}])
def test_weights_of_a_server_that_digests_in_another_way_are_neither_the_same_nor_others(theirs: Any) -> None:
    assert same_weights(replace(SERVED, **theirs), lambda _: "xxh3_128:aa") is None
