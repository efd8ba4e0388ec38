"""Prompts to token ids: what a template sees of a conversation, and what it may refuse."""

from __future__ import annotations

import asyncio
import threading

import grpc
import pytest

from policy_server.prompts import PromptEncoder, read_prompt
from policy_server.validation import Limits, Violations, scoring_request
from rlhf.failures import RpcFailure
from rlhf.policy.v1 import policy_pb2
from tests.support.models import make_byte_tokenizer

LIMITS = Limits(vocab_size=257, max_context_tokens=1000, default_max_new_tokens=16, max_log_probs_tokens=2000)


async def rendered(template: str, *messages: policy_pb2.ChatMessage, arguments: str = "") -> str:
    tokenizer = make_byte_tokenizer(chat_template=template)
    prompt = policy_pb2.Prompt(chat=policy_pb2.Chat(messages=messages, template_arguments_json=arguments))
    violations = Violations()
    source = read_prompt(violations, prompt, "prompt", LIMITS)
    violations.raise_if_any()
    return str(
        tokenizer.decode(await PromptEncoder(tokenizer, max_waiting=1).encode(source, path="prompt", max_tokens=1000))
    )


def turn(*texts: str, extra: str = "") -> policy_pb2.ChatMessage:
    return policy_pb2.ChatMessage(
        role="user", parts=[policy_pb2.ContentPart(text=text) for text in texts], extra_json=extra
    )


async def test_extra_json_is_merged_into_its_turn() -> None:
    template = "{% for m in messages %}{{ m.role }}/{{ m.name }}/{{ m.content }};{% endfor %}"

    assert await rendered(template, turn("a", "b", extra='{"name": "Ann"}'), turn(extra='{"name": "Bob"}')) == (
        "user/Ann/ab;user/Bob/;"
    )


async def test_tools_and_variables_reach_the_template() -> None:
    template = "{{ tools[0].function.name }} {{ mood }} {{ add_generation_prompt }}"
    arguments = '{"tools": [{"type": "function", "function": {"name": "look"}}], "mood": "gay"}'

    assert await rendered(template, turn("x"), arguments=arguments) == "look gay True"


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('alternate the roles') }}",
        "{{ messages[7].content }}",
        "{{ 1 / 0 }}",
        "{{ ''.__class__.__mro__ }}",
        "{% if false %}nothing is written{% endif %}",
    ],
)
async def test_a_conversation_the_template_cannot_write_is_the_callers_mistake(template: str) -> None:
    with pytest.raises(RpcFailure) as refused:
        await rendered(template, turn("x"))

    assert refused.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert [violation.field for violation in refused.value.violations] == ["prompt.chat"]


async def test_a_template_writes_its_special_tokens_itself() -> None:
    assert await rendered("{{ eos_token }}{{ messages[0].content }}", turn("x")) == "<|endoftext|>x"


# What would hold everybody up


async def test_text_that_no_tokens_of_the_context_could_hold_is_refused_before_it_is_encoded() -> None:
    encoder = PromptEncoder(make_byte_tokenizer(), max_waiting=1)
    longest = 1000 * len("<|endoftext|>")

    assert len(await encoder.encode("x" * longest, path="prompt", max_tokens=1000)) == longest
    with pytest.raises(RpcFailure, match="characters") as refused:
        await encoder.encode("x" * (longest + 1), path="prompt", max_tokens=1000)
    with pytest.raises(RpcFailure, match="characters") as of_chat:
        await rendered("{% for _ in range(20000) %}x{% endfor %}", turn("x"))

    for failure in (refused.value, of_chat.value):
        assert [violation.field for violation in failure.violations] == ["prompt"]


async def test_prompts_queue_for_their_encoding_up_to_a_limit() -> None:
    encoder = PromptEncoder(make_byte_tokenizer(), max_waiting=1)
    gate = threading.Event()
    encoder._thread.submit(gate.wait, 30)
    first = asyncio.create_task(encoder.encode("a", path="prompt", max_tokens=9))
    await asyncio.sleep(0)

    with pytest.raises(RpcFailure) as refused:
        await encoder.encode("b", path="prompt", max_tokens=9)
    assert await encoder.encode((1, 2), path="prompt", max_tokens=9) == (1, 2)
    gate.set()

    assert (refused.value.code, refused.value.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
    assert refused.value.retry_after
    assert len(await first) == len(await encoder.encode("b", path="prompt", max_tokens=9)) == 1


def test_ids_are_counted_before_each_is_looked_at() -> None:
    too_many = policy_pb2.Prompt(token_ids=policy_pb2.TokenIds(ids=[9999] * 1000))
    violations = Violations()
    assert read_prompt(violations, too_many, "prompt", LIMITS) == ()
    with pytest.raises(RpcFailure) as of_prompt:
        violations.raise_if_any()
    sequence = policy_pb2.Sequence(prompt_token_ids=[9999] * 600, completion_token_ids=[9999] * 401)
    with pytest.raises(RpcFailure) as of_scoring:
        scoring_request(policy_pb2.LogProbsRequest(sequences=[sequence] * 2), LIMITS, request_id="r")

    assert [violation.field for violation in of_prompt.value.violations] == ["prompt"]
    assert [violation.field for violation in of_scoring.value.violations] == ["sequences"]
