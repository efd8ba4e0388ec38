"""Prompts to token ids: what a template sees of a conversation, and what it may refuse."""

from __future__ import annotations

import grpc
import pytest

from policy_server.prompts import PromptEncoder, read_prompt
from policy_server.validation import Violations
from rlhf.failures import RpcFailure
from rlhf.policy.v1 import policy_pb2
from tests.support.models import make_byte_tokenizer


async def rendered(template: str, *messages: policy_pb2.ChatMessage, arguments: str = "") -> str:
    tokenizer = make_byte_tokenizer(chat_template=template)
    prompt = policy_pb2.Prompt(chat=policy_pb2.Chat(messages=messages, template_arguments_json=arguments))
    violations = Violations()
    source = read_prompt(violations, prompt, "prompt", vocab_size=257)
    violations.raise_if_any()
    return str(tokenizer.decode(await PromptEncoder(tokenizer).encode(source, path="prompt")))


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
