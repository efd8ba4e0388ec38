"""Every mistake a caller can make against PolicyService, and what the contract says it gets."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st

from policy_server import validation
from policy_server.engine.protocol import Priority
from policy_server.prompts import read_prompt
from rlhf.failures import RpcFailure
from rlhf.policy.v1 import policy_pb2
from tests.policy_server.harness import Served, generate, greedy, refused, serving, tokens, version
from tests.support.models import make_tiny_gpt2

INVALID = grpc.StatusCode.INVALID_ARGUMENT
FAILED = grpc.StatusCode.FAILED_PRECONDITION
NOT_FOUND = grpc.StatusCode.NOT_FOUND


@pytest.fixture(scope="module")
def untemplated_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tiny_gpt2(tmp_path_factory.mktemp("models") / "untemplated")
    (folder / "chat_template.jinja").unlink()
    return folder


def chat(*messages: policy_pb2.ChatMessage, arguments: str = "") -> policy_pb2.Prompt:
    return policy_pb2.Prompt(chat=policy_pb2.Chat(messages=messages, template_arguments_json=arguments))


def turn(text: str = "Hi", *, role: str = "user", extra: str = "") -> policy_pb2.ChatMessage:
    return policy_pb2.ChatMessage(role=role, parts=[policy_pb2.ContentPart(text=text)], extra_json=extra)


def sampling(**fields: Any) -> policy_pb2.GenerateRequest:
    return generate(**fields)


GENERATE: dict[str, tuple[policy_pb2.GenerateRequest, grpc.StatusCode, str]] = {
    "no prompt": (policy_pb2.GenerateRequest(), INVALID, "prompt"),
    "a prompt without a kind": (policy_pb2.GenerateRequest(prompt=policy_pb2.Prompt()), INVALID, "prompt"),
    "no ids": (generate(tokens()), INVALID, "prompt.token_ids.ids"),
    "empty text": (generate(policy_pb2.Prompt(text="")), INVALID, "prompt.text"),
    "an id out of range": (generate(tokens(1, 2, 257)), INVALID, "prompt.token_ids.ids[2]"),
    "a prompt that fills the context": (generate(tokens(*[1] * 128)), INVALID, "prompt"),
    "a text that fills the context": (generate(policy_pb2.Prompt(text="a" * 128)), INVALID, "prompt"),
    "no messages": (generate(chat()), INVALID, "prompt.chat.messages"),
    "a message without role": (generate(chat(turn(role=""))), INVALID, "prompt.chat.messages[0].role"),
    "a message without content": (
        generate(chat(policy_pb2.ChatMessage(role="user"))),
        INVALID,
        "prompt.chat.messages[0].parts",
    ),
    "a part without kind": (
        generate(chat(turn(), policy_pb2.ChatMessage(role="user", parts=[policy_pb2.ContentPart()]))),
        INVALID,
        "prompt.chat.messages[1].parts[0]",
    ),
    "extra_json that is no JSON": (generate(chat(turn(extra="{"))), INVALID, "prompt.chat.messages[0].extra_json"),
    "extra_json that is no object": (generate(chat(turn(extra="[]"))), INVALID, "prompt.chat.messages[0].extra_json"),
    "extra_json that sets the role": (
        generate(chat(turn(extra='{"role": "system"}'))),
        INVALID,
        "prompt.chat.messages[0].extra_json",
    ),
    "template arguments that are no JSON": (
        generate(chat(turn(), arguments="no")),
        INVALID,
        "prompt.chat.template_arguments_json",
    ),
    "a template of the caller's": (
        generate(chat(turn(), arguments='{"chat_template": "x"}')),
        INVALID,
        "prompt.chat.template_arguments_json",
    ),
    "arguments the template refuses": (
        generate(chat(turn(), arguments='{"continue_final_message": true}')),
        INVALID,
        "prompt.chat",
    ),
    "a prefix id out of range": (generate(completion_prefix=[257]), INVALID, "completion_prefix[0]"),
    "a prefix with two completions": (generate(completion_prefix=[1], n=2), INVALID, "sampling.n"),
    "a prefix that leaves nothing": (generate(completion_prefix=[1] * 8), INVALID, "completion_prefix"),
    "a prefix that fills the context": (
        generate(completion_prefix=[1] * 125, max_new_tokens=126),
        INVALID,
        "prompt",
    ),
    "temperature below 0": (sampling(temperature=-0.1), INVALID, "sampling.temperature"),
    "temperature NaN": (sampling(temperature=math.nan), INVALID, "sampling.temperature"),
    "temperature infinite": (sampling(temperature=math.inf), INVALID, "sampling.temperature"),
    "top_p 0": (sampling(top_p=0.0), INVALID, "sampling.top_p"),
    "top_p above 1": (sampling(top_p=1.01), INVALID, "sampling.top_p"),
    "top_p NaN": (sampling(top_p=math.nan), INVALID, "sampling.top_p"),
    "min_p below 0": (sampling(min_p=-0.5), INVALID, "sampling.min_p"),
    "min_p above 1": (sampling(min_p=2.0), INVALID, "sampling.min_p"),
    "repetition_penalty 0": (sampling(repetition_penalty=0.0), INVALID, "sampling.repetition_penalty"),
    "repetition_penalty infinite": (sampling(repetition_penalty=math.inf), INVALID, "sampling.repetition_penalty"),
    "max_new_tokens 0": (sampling(max_new_tokens=0), INVALID, "sampling.max_new_tokens"),
    "min above max": (sampling(min_new_tokens=9), INVALID, "sampling.min_new_tokens"),
    "an empty stop string": (sampling(stop_strings=["a", ""]), INVALID, "sampling.stop_strings[1]"),
    "a long stop string": (sampling(stop_strings=["é" * 129]), INVALID, "sampling.stop_strings[0]"),
    "too many stop strings": (sampling(stop_strings=["a"] * 17), INVALID, "sampling.stop_strings"),
    "a stop token out of range": (sampling(stop_token_ids=[300]), INVALID, "sampling.stop_token_ids[0]"),
    "n 0": (sampling(n=0), INVALID, "sampling.n"),
    "n above the limit": (sampling(n=validation.MAX_COMPLETIONS + 1), INVALID, "sampling.n"),
    "an unspecified kind": (generate(logprobs=[0]), INVALID, "logprobs[0]"),
    "an unknown kind": (generate(logprobs=[1, 77]), INVALID, "logprobs[1]"),
    "a repeated kind": (generate(logprobs=[1, 2, 1]), INVALID, "logprobs[2]"),
    "a precondition without rule": (generate(weights=policy_pb2.WeightsPrecondition()), INVALID, "weights.rule"),
    "an unknown priority": (generate(priority=9), INVALID, "priority"),
    "an unknown model": (generate(model="nobody"), NOT_FOUND, "model"),
}

LOG_PROBS: dict[str, tuple[policy_pb2.LogProbsRequest, grpc.StatusCode, str]] = {
    "no sequences": (policy_pb2.LogProbsRequest(), INVALID, "sequences"),
    "no prompt": (
        policy_pb2.LogProbsRequest(sequences=[policy_pb2.Sequence(completion_token_ids=[1])]),
        INVALID,
        "sequences[0].prompt_token_ids",
    ),
    "no completion": (
        policy_pb2.LogProbsRequest(sequences=[policy_pb2.Sequence(prompt_token_ids=[1])]),
        INVALID,
        "sequences[0].completion_token_ids",
    ),
    "an id out of range": (
        policy_pb2.LogProbsRequest(
            sequences=[
                policy_pb2.Sequence(prompt_token_ids=[1], completion_token_ids=[1]),
                policy_pb2.Sequence(prompt_token_ids=[1], completion_token_ids=[1, 2, 999]),
            ]
        ),
        INVALID,
        "sequences[1].completion_token_ids[2]",
    ),
    "too long": (
        policy_pb2.LogProbsRequest(
            sequences=[policy_pb2.Sequence(prompt_token_ids=[1] * 100, completion_token_ids=[1] * 29)]
        ),
        INVALID,
        "sequences[0]",
    ),
    "too many tokens": (
        policy_pb2.LogProbsRequest(
            sequences=[policy_pb2.Sequence(prompt_token_ids=[1] * 120, completion_token_ids=[1])] * 2200
        ),
        INVALID,
        "sequences",
    ),
    "temperature 0": (
        policy_pb2.LogProbsRequest(
            sequences=[policy_pb2.Sequence(prompt_token_ids=[1], completion_token_ids=[1])], temperature=0.0
        ),
        INVALID,
        "temperature",
    ),
    "an unknown model": (
        policy_pb2.LogProbsRequest(
            model="nobody", sequences=[policy_pb2.Sequence(prompt_token_ids=[1], completion_token_ids=[1])]
        ),
        NOT_FOUND,
        "model",
    ),
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    """One server for all mistakes: none of them may disturb it."""
    folder = make_tiny_gpt2(tmp_path_factory.mktemp("models") / "shared")
    async with serving(folder, max_message_bytes=4 << 20) as running:
        yield running


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("mistake", GENERATE)
async def test_generate_refuses(shared: Served, mistake: str) -> None:
    request, code, field = GENERATE[mistake]

    with refused(code, field):
        await shared.policy.Generate(request, timeout=20)


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("mistake", GENERATE)
async def test_stream_generate_refuses_with_the_path_inside_its_request(shared: Served, mistake: str) -> None:
    request, code, field = GENERATE[mistake]

    with refused(code, f"request.{field}"):
        await shared.policy.StreamGenerate(policy_pb2.StreamGenerateRequest(request=request), timeout=20).read()


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("mistake", LOG_PROBS)
async def test_log_probs_refuses(shared: Served, mistake: str) -> None:
    request, code, field = LOG_PROBS[mistake]

    with refused(code, field):
        await shared.policy.LogProbs(request, timeout=20)


@pytest.mark.asyncio(loop_scope="module")
async def test_stream_generate_needs_a_request(shared: Served) -> None:
    with refused(INVALID, "request"):
        await shared.policy.StreamGenerate(policy_pb2.StreamGenerateRequest(), timeout=20).read()


@pytest.mark.asyncio(loop_scope="module")
async def test_a_stream_interval_of_0_is_refused(shared: Served) -> None:
    with refused(INVALID, "stream_interval"):
        await shared.policy.StreamGenerate(
            policy_pb2.StreamGenerateRequest(request=generate(), stream_interval=0), timeout=20
        ).read()


@pytest.mark.asyncio(loop_scope="module")
async def test_get_model_refuses_an_unknown_model(shared: Served) -> None:
    with refused(NOT_FOUND, "model"):
        await shared.policy.GetModel(policy_pb2.GetModelRequest(model="nobody"), timeout=20)


@pytest.mark.asyncio(loop_scope="module")
async def test_all_wrong_fields_are_named_at_once(shared: Served) -> None:
    with refused(INVALID, "sampling.top_p") as caught:
        await shared.policy.Generate(generate(tokens(999), top_p=7.0, n=0), timeout=20)

    fields = {violation.field for violation in caught.failure.violations}
    assert fields == {"prompt.token_ids.ids[0]", "sampling.top_p", "sampling.n"}


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("rule", ["exact", "min"])
async def test_weights_that_are_not_live_fail_the_precondition(shared: Served, rule: str) -> None:
    wanted = policy_pb2.WeightsPrecondition(**{rule: version(1)})

    with refused(FAILED, reason="WEIGHTS_BEHIND"):
        await shared.policy.Generate(generate(weights=wanted), timeout=20)
    with refused(FAILED, reason="WEIGHTS_BEHIND"):
        await shared.policy.LogProbs(
            policy_pb2.LogProbsRequest(
                sequences=[policy_pb2.Sequence(prompt_token_ids=[1], completion_token_ids=[1])], weights=wanted
            ),
            timeout=20,
        )


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("rule", ["exact", "min"])
async def test_the_weights_loaded_at_start_can_be_named_too(shared: Served, rule: str) -> None:
    wanted = policy_pb2.WeightsPrecondition(**{rule: policy_pb2.WeightsVersion()})

    answer = await shared.policy.Generate(generate(weights=wanted), timeout=20)

    assert answer.completions


async def test_a_wrong_field_is_told_before_a_missing_template(untemplated_model: Path) -> None:
    async with serving(untemplated_model) as served:
        with refused(INVALID, "sampling.top_p"):
            await served.policy.Generate(generate(chat(turn()), top_p=2.0), timeout=20)


async def test_a_chat_without_a_template_fails_the_precondition(untemplated_model: Path) -> None:
    async with serving(untemplated_model) as served:
        with refused(FAILED, reason="NO_CHAT_TEMPLATE"):
            await served.policy.Generate(generate(chat(turn())), timeout=20)


@pytest.mark.asyncio(loop_scope="module")
async def test_mistakes_leave_the_server_as_it_was(shared: Served) -> None:
    before = await greedy(shared)
    for request, code, _ in GENERATE.values():
        with refused(code):
            await shared.policy.Generate(request, timeout=20)

    assert await greedy(shared) == before


LIMITS = validation.Limits(vocab_size=10, max_context_tokens=20, default_max_new_tokens=5, max_log_probs_tokens=100)
ANY_FLOAT = st.floats(width=32)
SAMPLING = st.builds(
    policy_pb2.SamplingParams,
    temperature=st.none() | ANY_FLOAT,
    top_k=st.none() | st.integers(0, 2**32 - 1),
    top_p=st.none() | ANY_FLOAT,
    min_p=st.none() | ANY_FLOAT,
    repetition_penalty=st.none() | ANY_FLOAT,
    max_new_tokens=st.none() | st.integers(0, 30),
    min_new_tokens=st.none() | st.integers(0, 30),
    stop_strings=st.lists(st.text(max_size=3), max_size=2),
    stop_token_ids=st.lists(st.integers(0, 12), max_size=2),
    seed=st.none() | st.integers(0, 2**64 - 1),
    n=st.none() | st.integers(0, 3),
)


@given(SAMPLING, st.lists(st.integers(0, 11), min_size=1, max_size=25), st.lists(st.integers(0, 11), max_size=8))
def test_whatever_passes_validation_is_legal_for_the_engine(
    params: policy_pb2.SamplingParams, ids: list[int], prefix: list[int]
) -> None:
    message = policy_pb2.GenerateRequest(prompt=tokens(*ids), sampling=params, completion_prefix=prefix)
    violations = validation.Violations()
    try:
        read_prompt(violations, message.prompt, "prompt", LIMITS)
        wanted = validation.generation_request(
            violations,
            message,
            LIMITS,
            request_id="r",
            default_priority=Priority.BULK,
            stream_interval=1,
            path="",
        )
        violations.raise_if_any()
        validation.check_room(ids, prefix, LIMITS, path="prompt")
    except RpcFailure:
        return

    sampling = wanted.sampling
    assert math.isfinite(sampling.temperature)
    assert sampling.temperature >= 0
    assert 0 < sampling.top_p <= 1
    assert 0 <= sampling.min_p <= 1
    assert math.isfinite(sampling.repetition_penalty)
    assert sampling.repetition_penalty > 0
    assert max(len(prefix) + 1, sampling.min_new_tokens) <= sampling.max_new_tokens
    assert len(ids) + len(prefix) < LIMITS.max_context_tokens
    assert max([*ids, *prefix, *sampling.stop_token_ids]) < LIMITS.vocab_size
    assert all(sampling.stop_strings)
    assert sampling.n == 1 or not prefix
