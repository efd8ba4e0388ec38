"""Forwards that make tokens: a prefill for rows that join, then one token per row and step on a key-value cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from policy_server.engine import cache as caches
from policy_server.engine.generation import Row
from policy_server.engine.model import ServedModel


@dataclass(eq=False)
class Cohort:
    """Rows of one model that decode in lockstep.

    mask: int64 [rows, time], 1 where the cache holds a token, 0 for padding on the left. The cache holds all tokens
    of a row but the last, which is the next input.
    """

    model: ServedModel
    rows: list[Row]
    cache: Cache
    mask: Tensor

    def step(self) -> Tensor:
        """Feed each row's last token; returns the logits of what follows, [rows, vocab]."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.rows), 1)], dim=-1)
        token_ids = [row.completion[-1] for row in self.rows]
        return self.model.step(token_ids, [row.length - 1 for row in self.rows], self.mask, self.cache)

    def drop_dead_rows(self) -> None:
        """Free the rows that want no more tokens, and the columns that are padding in all that remain."""
        kept = _places_filled([row.live for row in self.rows])
        if len(kept) == len(self.rows):
            return
        self.rows = [self.rows[index] for index in kept]
        if not kept:
            return
        caches.select(self.cache, kept, self.model.device)
        self.mask = self.mask[torch.tensor(kept, device=self.model.device)]
        # The cache, like the mask, lacks the last sampled token.
        columns = self.mask.shape[-1] - max(row.length - 1 for row in self.rows)
        if columns and caches.is_plain(self.cache):
            self.mask = self.mask[:, columns:]
            caches.trim(self.cache, columns=columns, remaining=self.mask.shape[-1])

    def can_absorb(self, other: Cohort) -> bool:
        """Whether both can decode as one batch."""
        return self.model is other.model and caches.is_plain(self.cache) and caches.is_plain(other.cache)

    def absorb(self, other: Cohort) -> None:
        """Take over the rows of another cohort."""
        columns = max(self.mask.shape[-1], other.mask.shape[-1])
        caches.merge(self.cache, other.cache, columns=columns)
        self.mask = torch.cat([caches.pad_left(mask, columns, dim=-1) for mask in (self.mask, other.mask)])
        self.rows += other.rows


def _places_filled(live: Sequence[bool]) -> list[int]:
    """The places of live rows, those of the end in the places of the dead before them: so few rows move."""
    count = sum(live)
    last = [place for place in range(count, len(live)) if live[place]]
    return [place if live[place] else last.pop() for place in range(count)]


def prefill(model: ServedModel, rows: Sequence[Row]) -> tuple[Cohort, Tensor]:
    """Run prompts and the tokens so far; returns the cohort and the logits of what follows, [rows, vocab].

    Completions that start from the same tokens are run once and their cache is copied.
    """
    sequences: list[list[int]] = []
    sources: list[int] = []
    fresh: dict[int, int] = {}
    for row in rows:
        source = fresh.setdefault(id(row.generation), len(sequences)) if row.fresh else len(sequences)
        if source == len(sequences):
            sequences.append([*row.prompt, *row.completion])
        sources.append(source)
        row.oldest_cache = model.version
    width = max(map(len, sequences))
    token_ids = torch.tensor([[0] * (width - len(each)) + each for each in sequences], device=model.device)
    lengths = torch.tensor([len(each) for each in sequences], device=model.device)
    mask = (torch.arange(width, device=model.device) >= width - lengths.unsqueeze(-1)).long()
    cache = model.new_cache()
    logits = model.logits(token_ids, mask, keep=1, cache=cache)[:, -1]
    if sources != list(range(len(sequences))):
        caches.select(cache, sources, model.device)
        index = torch.tensor(sources, device=model.device)
        logits, mask = logits[index], mask[index]
    return Cohort(model, list(rows), cache, mask), logits


def prefill_tokens(rows: Sequence[Row]) -> int:
    """Tokens, without padding, that `prefill` runs for these rows."""
    return sum({id(row.generation) if row.fresh else id(row): row.length for row in rows}.values())
