"""Generation in this process, with transformers' own `generate`, as TRL's `PPOTrainer.generate` does it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from trainer.model import AutoModelForCausalLMWithValueHead

# A row that one of these ended has no EOS to find its end by, and padding may look like tokens: such rows go alone.
_ENDS_WITHOUT_EOS = ("stop_strings", "stopping_criteria")


def generate_one(
    model: AutoModelForCausalLMWithValueHead, query: Tensor, *, return_prompt: bool, settings: dict[str, Any]
) -> Tensor:
    """The completion of a prompt [q] as one row [1, q + t], or [1, t] without the prompt, as `generate` returns it."""
    with _no_dropout(model):
        rows: Tensor = model.generate(
            input_ids=query[None], **{"attention_mask": torch.ones_like(query[None]), **settings}
        )
    return rows if return_prompt else rows[:, query.numel() :]


def generate_batched(
    model: AutoModelForCausalLMWithValueHead,
    queries: list[Tensor],
    *,
    pad_id: int,
    batch_size: int,
    return_prompt: bool,
    length_sampler: Callable[[], int] | None,
    settings: dict[str, Any],
) -> list[Tensor]:
    """The completions of prompts [q_i], `batch_size` at a time, padded on the left, and each cut after its first EOS.

    The cut looks at the completion alone: an EOS in the prompt stays where it is. `length_sampler` gives
    `max_new_tokens` for each batch anew.
    """
    if settings.get("num_return_sequences", 1) != 1:
        raise ValueError("num_return_sequences: a list of queries gets one response each; repeat the query instead")
    if any(settings.get(name) is not None for name in _ENDS_WITHOUT_EOS):
        batch_size = 1
    eos_ids = _eos_ids(model, settings)
    completions: list[Tensor] = []
    for start in range(0, len(queries), batch_size):
        batch = queries[start : start + batch_size]
        if length_sampler is not None:
            settings = {**settings, "max_new_tokens": length_sampler()}
        width = max(query.numel() for query in batch)
        input_ids = batch[0].new_full((len(batch), width), pad_id)
        attention_mask = torch.zeros_like(input_ids)
        for row, query in enumerate(batch):
            input_ids[row, width - query.numel() :] = query
            attention_mask[row, width - query.numel() :] = 1
        with _no_dropout(model):
            rows: Tensor = model.generate(input_ids=input_ids, attention_mask=attention_mask, **settings)
        for query, row_ids in zip(batch, rows, strict=True):
            completion = _cut_after_eos(row_ids[width:], eos_ids)
            completions.append(torch.cat([query, completion]) if return_prompt else completion)
    return completions


def _eos_ids(model: AutoModelForCausalLMWithValueHead, settings: dict[str, Any]) -> list[int]:
    ids = settings.get("eos_token_id", getattr(model.generation_config, "eos_token_id", None))
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else [int(token) for token in ids]


def _cut_after_eos(completion: Tensor, eos_ids: list[int]) -> Tensor:
    """[t] up to its first EOS, which stays."""
    ends = torch.isin(completion, completion.new_tensor(eos_ids)).nonzero()
    return completion if ends.numel() == 0 else completion[: int(ends[0]) + 1]


@contextlib.contextmanager
def _no_dropout(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every module's own comes back after (with gradient checkpointing some layers train)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
