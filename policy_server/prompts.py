"""From what a caller sends as a prompt (text, token ids, a conversation) to the token ids the model is given."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from policy_server.validation import Limits, Violations, check_ids
from rlhf.failures import failed_precondition, invalid_argument, overloaded
from rlhf.policy.v1 import policy_pb2

# Arguments of apply_chat_template that steer the renderer, not the template, and are the server's alone; a
# `chat_template` of the caller's above all: the server renders its model's template and no other.
_RENDERERS_ARGUMENTS = frozenset(
    {
        "chat_template",
        "conversation",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "sanitize_control_tokens",
        "tokenize",
        "tokenizer_kwargs",
        "truncation",
    }
)
_TURN_FIELDS = frozenset({"role", "content"})
_LONGEST_QUOTE = 300
_RETRY_SECONDS = 1.0


@dataclass(frozen=True)
class Conversation:
    """Turns as a chat template takes them, and variables for it."""

    turns: list[dict[str, Any]]
    arguments: dict[str, Any]


PromptSource = tuple[int, ...] | str | Conversation


def read_prompt(violations: Violations, prompt: policy_pb2.Prompt, path: str, limits: Limits) -> PromptSource:
    """What is to be encoded of `prompt`, which stands at field path `path`; what is wrong goes to `violations`."""
    kind = prompt.WhichOneof("kind")
    if kind == "token_ids":
        if len(prompt.token_ids.ids) >= limits.max_context_tokens:
            violations.add(path, _too_long(f"{len(prompt.token_ids.ids)} tokens", limits.max_context_tokens))
            return ()
        ids = tuple(prompt.token_ids.ids)
        violations.check(bool(ids), f"{path}.token_ids.ids", "at least one token is required")
        check_ids(violations, ids, f"{path}.token_ids.ids", limits.vocab_size)
        return ids
    if kind == "chat":
        return _read_chat(violations, prompt.chat, f"{path}.chat")
    violations.check(kind == "text", path, "one of text, token_ids and chat is required")
    violations.check(kind != "text" or bool(prompt.text), f"{path}.text", "must not be empty")
    return prompt.text


class PromptEncoder:
    """Turns prompts into ids with a copy of the tokenizer of its own, on a thread of its own.

    Tokenizing a long text takes longer than the event loop may stand still, and a fast tokenizer must not be used by
    two threads at a time. `max_waiting` prompts may wait for it, and those that no model could take are not encoded.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_waiting: int) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)
        self._longest_token = max(map(len, tokenizer.get_vocab()))  # characters
        self._max_waiting = max_waiting
        self._waiting = 0
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prompts")

    async def encode(self, source: PromptSource, *, path: str, max_tokens: int) -> tuple[int, ...]:
        """Token ids of a prompt that `read_prompt` accepted at field path `path`; their range is not checked here.

        Raises failed_precondition NO_CHAT_TEMPLATE, overloaded, and invalid_argument for a conversation that the
        template refuses, for what encodes to no token, and for text too long for `max_tokens` of any kind.
        """
        if isinstance(source, tuple):
            return source
        if isinstance(source, str):
            self._check_length(source, path, max_tokens)
            kind, ids = "text", await self._on_thread(lambda: self._encode_text(source))
        else:
            kind, ids = "chat", await self._on_thread(lambda: self._encode_chat(source, path, max_tokens))
        if not ids:
            raise invalid_argument(f"{path}.{kind}", "holds nothing that the tokenizer makes a token of")
        return ids

    async def _on_thread(self, work: Callable[[], tuple[int, ...]]) -> tuple[int, ...]:
        if self._waiting >= self._max_waiting:
            raise overloaded(f"{self._waiting} prompts are waiting to be encoded", _RETRY_SECONDS)
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        finally:
            self._waiting -= 1

    def _check_length(self, text: str, path: str, max_tokens: int) -> None:
        if len(text) > self._longest_token * max_tokens:
            raise invalid_argument(path, _too_long(f"{len(text)} characters", max_tokens))

    def _encode_text(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        # verbose: a prompt beyond model_max_length is refused by validation, the tokenizer need not warn as well
        return tuple(self._tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])

    def _encode_chat(self, chat: Conversation, path: str, max_tokens: int) -> tuple[int, ...]:
        if not self._tokenizer.chat_template:
            raise failed_precondition("NO_CHAT_TEMPLATE", "the model has no chat template: send text or token ids")
        try:
            rendered = self._tokenizer.apply_chat_template(chat.turns, tokenize=False, **chat.arguments)
        except Exception as error:  # a template is a program: what it raises on this input is for the caller to mend
            raise invalid_argument(
                f"{path}.chat", f"the chat template refused the conversation: {_quote(error)}"
            ) from error
        self._check_length(str(rendered), path, max_tokens)
        return self._encode_text(str(rendered), add_special_tokens=False)  # the template has written them


def _read_chat(violations: Violations, chat: policy_pb2.Chat, path: str) -> Conversation:
    violations.check(bool(chat.messages), f"{path}.messages", "at least one message is required")
    turns = [
        _read_turn(violations, message, f"{path}.messages[{index}]") for index, message in enumerate(chat.messages)
    ]
    path = f"{path}.template_arguments_json"
    arguments = _read_json_object(violations, chat.template_arguments_json, path)
    for name in sorted(arguments.keys() & _RENDERERS_ARGUMENTS):
        violations.add(path, f"{name} is not for the caller to set")
    return Conversation(turns, {"add_generation_prompt": True, **arguments})


def _read_turn(violations: Violations, message: policy_pb2.ChatMessage, path: str) -> dict[str, Any]:
    violations.check(bool(message.role), f"{path}.role", "required")
    violations.check(bool(message.parts or message.extra_json), f"{path}.parts", "required without extra_json")
    for index, part in enumerate(message.parts):
        violations.check(
            part.WhichOneof("kind") == "text", f"{path}.parts[{index}]", "must be text; its kind is unset or unknown"
        )
    extra = _read_json_object(violations, message.extra_json, f"{path}.extra_json")
    for key in sorted(extra.keys() & _TURN_FIELDS):
        violations.add(f"{path}.extra_json", f"{key} has a field of its own")
    return {"role": message.role, "content": "".join(part.text for part in message.parts), **extra}


def _read_json_object(violations: Violations, text: str, path: str) -> dict[str, Any]:
    if not text:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        violations.add(path, f"not JSON: {_quote(error)}")
        return {}
    if not isinstance(value, dict):
        violations.add(path, "must be a JSON object")
        return {}
    return value


def _too_long(what: str, max_tokens: int) -> str:
    return f"its {what} leave no room for one more within max_context_tokens = {max_tokens}"


def _quote(error: Exception) -> str:
    text = str(error) or type(error).__name__
    return text if len(text) <= _LONGEST_QUOTE else text[:_LONGEST_QUOTE] + "…"
