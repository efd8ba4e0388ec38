"""A run holds its servers to what it began with, and says what differs."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf.policy.v1 import policy_pb2
from tests.trainer.servers import ScriptedPolicy, completed, serving
from trainer.clients.policy import PolicyClient
from trainer.run.checkpoints import Pins
from trainer.run.pinning import PinError, check_pins, check_policy_server

PINS = Pins("xxh3_128:aa", "sha256:bb", "1")


async def check(server: ScriptedPolicy, *, context_tokens: int = 128) -> None:
    async with serving(server.add_to) as address:
        client = PolicyClient(address)
        try:
            await check_policy_server(
                client, tokenizer_digest="sha256:bb", vocab_size=257, context_tokens=context_tokens
            )
        finally:
            await client.close()


async def test_a_server_of_the_same_model_passes() -> None:
    await check(ScriptedPolicy(completed))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("tokenizer_digest", "sha256:cc", "another tokenizer"),
        ("vocab_size", 300, "300 logit columns, the trainer's --model 257"),
        ("max_context_tokens", 64, "takes 64 tokens .* may need 128: lower --max-prompt-tokens"),
        ("logprobs", [policy_pb2.LOG_PROB_KIND_RAW], "LOG_PROB_KIND_PROCESSED"),
    ],
)
async def test_a_server_that_does_not_fit_is_refused_with_what_differs(field: str, value: Any, message: str) -> None:
    server = ScriptedPolicy(completed)
    server.model.ClearField(field)  # type: ignore[arg-type]
    server.model.MergeFrom(policy_pb2.GetModelResponse(**{field: value}))

    with pytest.raises(PinError, match=message):
        await check(server)


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
