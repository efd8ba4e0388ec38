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


class Prefill:
    """Prompts, and tokens so far, on their way into a cache: a rectangle that is read some columns at a time.

    Completions that start from the same tokens are read once, and their cache is copied at the end.
    """

    def __init__(self, model: ServedModel, rows: Sequence[Row]) -> None:
        self.model = model
        self.rows = list(rows)
        self.cache = model.new_cache()
        self.tokens = sum({id(row.generation) if row.fresh else id(row): row.length for row in rows}.values())
        self._sources: list[int] = []  # by row: its place in the rectangle
        sequences: list[list[int]] = []
        fresh: dict[int, int] = {}
        for row in rows:
            source = fresh.setdefault(id(row.generation), len(sequences)) if row.fresh else len(sequences)
            if source == len(sequences):
                sequences.append([*row.prompt, *row.completion])
            self._sources.append(source)
            row.oldest_cache = model.version
        width = max(map(len, sequences))
        lengths = torch.tensor([len(each) for each in sequences], device=model.device)
        self._token_ids = torch.tensor([[0] * (width - len(each)) + each for each in sequences], device=model.device)
        self._mask = (torch.arange(width, device=model.device) >= width - lengths.unsqueeze(-1)).long()
        self._read = 0

    @property
    def urgency(self) -> tuple[int, int]:
        """Less = sooner: the priority and the arrival of the most urgent request."""
        return min((int(row.generation.request.priority), row.generation.arrival) for row in self.rows)

    def advance(self, tokens: int) -> Tensor | None:
        """Read columns of about `tokens` tokens, padding included; the logits of what follows [rows, vocab] at the end.

        Caches that hold more than keys and values are read at once.
        """
        sequences, width = self._token_ids.shape
        columns = max(tokens // sequences, 1) if caches.is_plain(self.cache) else width
        end = min(self._read + columns, width)
        read = self._token_ids[:, self._read : end]
        logits = self.model.logits(read, self._mask[:, :end], keep=1, cache=self.cache)[:, -1]
        self._read = end
        return logits[torch.tensor(self._sources, device=self.model.device)] if end == width else None

    def cohort(self) -> Cohort:
        """The rows, once all is read."""
        if self._sources != list(range(len(self._token_ids))):
            caches.select(self.cache, self._sources, self.model.device)
            self._mask = self._mask[torch.tensor(self._sources, device=self.model.device)]
        return Cohort(self.model, self.rows, self.cache, self._mask)

    def drop_dead_rows(self) -> None:
        """Free the rows that want no more tokens."""
        live = [index for index, row in enumerate(self.rows) if row.live]
        if len(live) == len(self.rows):
            return
        self.rows = [self.rows[index] for index in live]
        kept = sorted({self._sources[index] for index in live})
        self._sources = [kept.index(self._sources[index]) for index in live]
        if kept and len(kept) < len(self._token_ids):
            index = torch.tensor(kept, device=self.model.device)
            self._token_ids, self._mask = self._token_ids[index], self._mask[index]
            if self._read:
                caches.select(self.cache, kept, self.model.device)
