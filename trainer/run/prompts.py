"""Prompts: read from a file or the hub, made into token ids, handed out in an order that a resumed run repeats."""

from __future__ import annotations

import enum
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rlhf.tables import TableError, is_table, read_rows
from trainer.run.seeds import derive_seed

Messages = list[dict[str, Any]]


class PromptDataError(ValueError):
    """The prompts can't be read or used; the message says which file, row and column."""


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Any:
        """Encode; the result's "input_ids" are the ids."""
        ...

    def apply_chat_template(self, conversation: Messages, *, tokenize: bool, add_generation_prompt: bool) -> Any:
        """Render a conversation as text."""
        ...


@dataclass(frozen=True)
class Record:
    """One row of the data: its place there, the prompt, and every other column for the reward.

    `metadata` holds strings as they are; a column with other values in any row is JSON text in every row, and its
    name is in `json_keys`. A column that is null in this row is absent.
    """

    row: int
    prompt: str | Messages
    metadata: Mapping[str, str] = field(default_factory=dict)
    json_keys: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Prompt:
    """A record ready for a rollout: `text` is what the reward sees, `token_ids` what the policy is given."""

    record: Record
    text: str
    token_ids: tuple[int, ...]

    @property
    def messages(self) -> Messages | None:
        """The conversation, or None when the data holds plain text."""
        return None if isinstance(self.record.prompt, str) else self.record.prompt


class DropReason(enum.Enum):
    """Why a prompt was not trained on; the names are the metrics' labels."""

    EMPTY_PROMPT = "empty_prompt"
    PROMPT_TOO_LONG = "prompt_too_long"
    EMPTY_COMPLETION = "empty_completion"
    FAILED = "failed"
    ABSTAINED = "abstained"
    STRAGGLER = "straggler"


def load_records(source: str, *, column: str, split: str = "train") -> list[Record]:
    """Read a table (see `rlhf.tables`), or a dataset that the `datasets` library loads (a hub name or a folder).

    Raises PromptDataError when nothing is there or the column is missing; the error names the columns that exist.
    """
    path = Path(source)
    try:
        table = list(read_rows(path) if path.is_file() or is_table(path) else _read_dataset(source, split))
    except TableError as error:
        raise PromptDataError(str(error)) from error
    if not table:
        raise PromptDataError(f"{source}: there are no rows; give one that has some (--data, --eval-data)")
    # A column is sent as JSON or as plain strings in every row alike, so that rows fit into one request.
    json_keys = frozenset(
        key for row in table for key, value in row.items() if key != column and not isinstance(value, str | None)
    )
    return [_record(source, index, row, column, json_keys) for index, row in enumerate(table)]


def encode(record: Record, tokenizer: Tokenizer) -> Prompt:
    """Render (a chat by its template, ready for the assistant's turn) and encode one record.

    Plain text gets the tokenizer's own special tokens; a template has written them already.
    """
    if isinstance(record.prompt, str):
        return Prompt(record, record.prompt, tuple(tokenizer(record.prompt)["input_ids"]))
    text = tokenizer.apply_chat_template(record.prompt, tokenize=False, add_generation_prompt=True)
    return Prompt(record, text, tuple(tokenizer(text, add_special_tokens=False)["input_ids"]))


@dataclass(frozen=True)
class Cursor:
    """How far the prompts are used up: `position` in the permutation of pass `epoch` over the data."""

    epoch: int = 0
    position: int = 0


@dataclass(frozen=True)
class Draw:
    """One prompt of a draw with the place it came from; `dropped` says why it can't be used, None = it can."""

    at: Cursor
    prompt: Prompt
    dropped: DropReason | None = None


class PromptSource:
    """Hands out prompts in a permutation of each pass that depends on the seed and the pass alone.

    Drawing changes nothing: the caller keeps the cursor that comes back, and only once the prompts are accounted for.
    """

    def __init__(self, records: Sequence[Record], tokenizer: Tokenizer, *, seed: int, max_prompt_tokens: int) -> None:
        self._records = records
        self._tokenizer = tokenizer
        self._seed = seed
        self._max_prompt_tokens = max_prompt_tokens
        self._encoded: dict[int, Prompt] = {}
        self._order: tuple[int, np.ndarray[Any, np.dtype[np.int64]]] | None = None

    def __len__(self) -> int:
        return len(self._records)

    def draw(self, cursor: Cursor, count: int) -> tuple[list[Draw], Cursor]:
        """The next draws from `cursor` on, until `count` of them are usable, and the cursor after them.

        Raises PromptDataError when a whole pass holds no usable prompt.
        """
        draws: list[Draw] = []
        usable = unusable_in_a_row = 0
        while usable < count:
            order = self._permutation(cursor.epoch)
            prompt = self._prompt(int(order[cursor.position]))
            dropped = self._why_dropped(prompt)
            draws.append(Draw(cursor, prompt, dropped))
            usable += dropped is None
            unusable_in_a_row = 0 if dropped is None else unusable_in_a_row + 1
            if unusable_in_a_row >= 2 * len(self._records):
                raise PromptDataError(
                    f"none of the {len(self._records)} prompts has 1 to {self._max_prompt_tokens} tokens: give shorter "
                    "ones (--data), raise --max-prompt-tokens, or lower --max-new-tokens, which shares the context"
                )
            cursor = self._next(cursor)
        return draws, cursor

    def _next(self, cursor: Cursor) -> Cursor:
        if cursor.position + 1 < len(self._records):
            return Cursor(cursor.epoch, cursor.position + 1)
        return Cursor(cursor.epoch + 1, 0)

    def _permutation(self, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        if self._order is None or self._order[0] != epoch:
            # RandomState's stream is frozen for ever; Generator's may change between numpy versions.
            random = np.random.RandomState(derive_seed(self._seed, "prompts", epoch) % 2**32)
            self._order = (epoch, random.permutation(len(self._records)))
        return self._order[1]

    def _prompt(self, row: int) -> Prompt:
        if row not in self._encoded:
            self._encoded[row] = encode(self._records[row], self._tokenizer)
        return self._encoded[row]

    def _why_dropped(self, prompt: Prompt) -> DropReason | None:
        if not prompt.token_ids:
            return DropReason.EMPTY_PROMPT
        if len(prompt.token_ids) > self._max_prompt_tokens:
            return DropReason.PROMPT_TOO_LONG
        return None


def _record(source: str, index: int, row: Mapping[str, Any], column: str, json_keys: frozenset[str]) -> Record:
    if column not in row:
        there = ", ".join(map(repr, row)) or "none"
        raise PromptDataError(f"{source}: row {index} has no column {column!r} (--prompt-column); it has {there}")
    prompt = row[column]
    if not isinstance(prompt, str) and not _is_conversation(prompt):
        raise PromptDataError(
            f"{source}: row {index}: {column!r} must be text or a list of messages with role and content, "
            f"not {type(prompt).__name__}"
        )
    metadata = {
        key: json.dumps(value, ensure_ascii=False, default=str) if key in json_keys else value
        for key, value in row.items()
        if key != column and value is not None
    }
    return Record(index, prompt, metadata, json_keys)


def _is_conversation(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, dict) and isinstance(turn.get("role"), str) for turn in value)
    )


def _read_dataset(name: str, split: str) -> Iterator[Mapping[str, Any]]:
    from datasets.load import load_dataset

    try:
        yield from load_dataset(name, split=split)
    except Exception as error:
        raise PromptDataError(f"{name}: no file of that name, and `datasets` can't load it: {error}") from error
