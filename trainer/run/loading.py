"""What the trainer loads before it talks to anyone: the policy, its tokenizer, a reference of its own, the prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from rlhf.fingerprints import tokenizer_digest
from rlhf.logs import get_logger
from trainer.model import AutoModelForCausalLMWithValueHead
from trainer.run.checkpoints import realign_parameters
from trainer.run.prompts import Prompt, Record, encode, load_records
from trainer.run.seeds import derive_seed
from trainer.settings import ReferencePlace, TrainerSettings

_log = get_logger(__name__)


class SettingsError(ValueError):
    """Settings that don't fit the model or the data; the message says what to change."""


@dataclass(frozen=True)
class Loaded:
    """The policy being trained and what goes with it."""

    model: AutoModelForCausalLMWithValueHead
    tokenizer: Any
    tokenizer_digest: str
    reference: PreTrainedModel | None
    max_prompt_tokens: int
    training: Sequence[Record]
    held_out: Sequence[Prompt]

    @property
    def logit_columns(self) -> int:
        """Width of the policy's logits, padding included."""
        head = self.model.pretrained_model.get_output_embeddings()  # type: ignore[no-untyped-call]
        columns: int = head.weight.shape[0]
        return columns


def load(settings: TrainerSettings, checkpoint: Path | None) -> Loaded:
    """Load from the checkpoint, or at a run's beginning from what --model names; a fresh value head uses torch's seed.

    Raises SettingsError and PromptDataError.
    """
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    source = str(checkpoint or settings.model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLMWithValueHead.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise SettingsError(f"can't load {source} (--model): {error}") from error
    realign_parameters(model)
    reference = None
    if settings.reference is ReferencePlace.TRAINER:
        reference = AutoModelForCausalLM.from_pretrained(
            settings.reference_model or settings.model, dtype=torch.float32
        )
        realign_parameters(reference)
    max_prompt_tokens = _max_prompt_tokens(settings, _context_tokens(model))
    training, held_out = _records(settings)
    return Loaded(
        model=model,
        tokenizer=tokenizer,
        tokenizer_digest=tokenizer_digest(tokenizer),
        reference=reference,
        max_prompt_tokens=max_prompt_tokens,
        training=training,
        held_out=_usable([encode(record, tokenizer) for record in held_out], max_prompt_tokens),
    )


def _records(settings: TrainerSettings) -> tuple[Sequence[Record], Sequence[Record]]:
    """Training records and held-out ones, which are the same rows at every start of the run."""
    records = load_records(settings.data, column=settings.prompt_column, split=settings.data_split)
    if settings.eval_prompts == 0:
        return records, []
    if settings.eval_data is not None:
        others = load_records(settings.eval_data, column=settings.prompt_column, split=settings.eval_split)
        return records, others[: settings.eval_prompts]
    return split_off_held_out(records, most=min(settings.eval_prompts, len(records) // 5), seed=settings.seed)


def split_off_held_out(records: Sequence[Record], *, most: int, seed: int) -> tuple[Sequence[Record], Sequence[Record]]:
    """Records to train on, and up to `most` others to evaluate on; no prompt is in both, however often it is repeated.

    A function of the records and the seed alone.
    """
    repeated: dict[str, list[Record]] = {}
    for record in records:
        repeated.setdefault(json.dumps(record.prompt, default=str), []).append(record)
    held_out: list[Record] = []
    for group in sorted(repeated.values(), key=lambda group: derive_seed(seed, "held out", group[0].row)):
        if len(held_out) + len(group) <= most:
            held_out += group
    rows = {record.row for record in held_out}
    if most and not held_out:
        _log.warning("the data repeats its prompts so often that none can be held out; give --eval-data")
    return [record for record in records if record.row not in rows], held_out


def _usable(prompts: Sequence[Prompt], max_prompt_tokens: int) -> list[Prompt]:
    usable = [prompt for prompt in prompts if 0 < len(prompt.token_ids) <= max_prompt_tokens]
    if len(usable) < len(prompts):
        _log.warning("held-out prompts that are empty or too long are left out", count=len(prompts) - len(usable))
    return usable


def _context_tokens(model: AutoModelForCausalLMWithValueHead) -> int | None:
    tokens = getattr(model.pretrained_model.config, "max_position_embeddings", None)
    return tokens if isinstance(tokens, int) else None


def _max_prompt_tokens(settings: TrainerSettings, context: int | None) -> int:
    if context is None:
        if settings.max_prompt_tokens is None:
            raise SettingsError("the model states no context length: give --max-prompt-tokens")
        return settings.max_prompt_tokens
    room = context - settings.max_new_tokens
    if room < 1:
        raise SettingsError(
            f"max_new_tokens ({settings.max_new_tokens}) leaves no room for a prompt: the model's context is {context}"
        )
    if settings.max_prompt_tokens is None:
        return room
    if settings.max_prompt_tokens > room:
        raise SettingsError(
            f"max_prompt_tokens ({settings.max_prompt_tokens}) + max_new_tokens ({settings.max_new_tokens}) is more "
            f"than the model's context of {context}"
        )
    return settings.max_prompt_tokens
