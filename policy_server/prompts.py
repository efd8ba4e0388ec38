"""From what a caller sends as a prompt (text, token ids, a conversation) to the token ids the model is given."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf.failures import failed_precondition, invalid_argument
from rlhf.policy.v1 import policy_pb2

# Arguments of apply_chat_template that steer the rendering itself and are the server's alone; a `chat_template` of
# the caller's above all: the server renders its model's template and no other.
_RESERVED_ARGUMENTS = frozenset(
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
_RESERVED_TURN_KEYS = frozenset({"role", "content"})
_LONGEST_QUOTE = 300


class PromptEncoder:
    """Turns prompts into ids with a copy of the tokenizer of its own, on a thread of its own.

    Tokenizing a long text takes longer than the event loop may stand still, and a fast tokenizer must not be used by
    two threads at a time.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prompts")

    async def encode(self, prompt: policy_pb2.Prompt, *, path: str) -> tuple[int, ...]:
        """Token ids of `prompt`, which stands at field path `path` of the request; their range is not checked here.

        Raises invalid_argument with the path of the offending field, failed_precondition NO_CHAT_TEMPLATE.
        """
        kind = prompt.WhichOneof("kind")
        if kind == "token_ids":
            ids: Sequence[int] = prompt.token_ids.ids
        elif kind == "text":
            ids = await self._on_thread(self._encode_text, prompt.text)
        elif kind == "chat":
            ids = await self._on_thread(self._encode_chat, prompt.chat, f"{path}.chat")
        else:
            raise invalid_argument(path, "one of text, token_ids and chat is required")
        if not ids:
            field = f"{path}.token_ids.ids" if kind == "token_ids" else f"{path}.{kind}"
            raise invalid_argument(field, "the prompt must hold at least one token")
        return tuple(ids)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _on_thread(self, function: Any, *arguments: Any) -> list[int]:
        ids: list[int] = await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)
        return ids

    def _encode_text(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        # verbose: a prompt beyond model_max_length is refused by validation, the tokenizer need not warn as well
        ids: list[int] = self._tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
        return ids

    def _encode_chat(self, chat: policy_pb2.Chat, path: str) -> list[int]:
        # The template writes the special tokens itself.
        return self._encode_text(self._render(chat, path), add_special_tokens=False)

    def _render(self, chat: policy_pb2.Chat, path: str) -> str:
        if not self._tokenizer.chat_template:
            raise failed_precondition(
                "NO_CHAT_TEMPLATE", "the model's tokenizer has no chat template: send text or token ids"
            )
        if not chat.messages:
            raise invalid_argument(f"{path}.messages", "a conversation needs at least one message")
        turns = [_turn(message, f"{path}.messages[{index}]") for index, message in enumerate(chat.messages)]
        arguments = _json_object(chat.template_arguments_json, f"{path}.template_arguments_json")
        for name in sorted(arguments.keys() & _RESERVED_ARGUMENTS):
            raise invalid_argument(f"{path}.template_arguments_json", f"{name} is not an argument a caller may set")
        arguments.setdefault("add_generation_prompt", True)
        try:
            rendered: str = self._tokenizer.apply_chat_template(turns, tokenize=False, **arguments)
        except Exception as error:  # a template is a program: what it raises on this input is for the caller to mend
            raise invalid_argument(path, f"the chat template refused the conversation: {_quote(error)}") from error
        return rendered


def _turn(message: policy_pb2.ChatMessage, path: str) -> dict[str, Any]:
    if not message.role:
        raise invalid_argument(f"{path}.role", "a message needs a role")
    texts = []
    for index, part in enumerate(message.parts):
        if part.WhichOneof("kind") != "text":
            raise invalid_argument(f"{path}.parts[{index}]", "a part must be text; its kind is unset or unknown here")
        texts.append(part.text)
    extra = _json_object(message.extra_json, f"{path}.extra_json")
    for key in sorted(extra.keys() & _RESERVED_TURN_KEYS):
        raise invalid_argument(f"{path}.extra_json", f"{key} has a field of its own")
    return {"role": message.role, "content": "".join(texts), **extra}


def _json_object(text: str, path: str) -> dict[str, Any]:
    if not text:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise invalid_argument(path, f"not JSON: {_quote(error)}") from error
    if not isinstance(value, dict):
        raise invalid_argument(path, "must be a JSON object")
    return value


def _quote(error: Exception) -> str:
    text = str(error) or type(error).__name__
    return text if len(text) <= _LONGEST_QUOTE else text[:_LONGEST_QUOTE] + "…"
