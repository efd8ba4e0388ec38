"""The processes that train one model together, and which rows of a forward pass each of them computes.

Every rank has the whole batch (token ids are small) and computes by itself whatever costs little: rewards, advantages,
whitening, losses, statistics, the KL coefficient. Forward passes alone are shared out, and what they say of each token
is gathered. So every number is of all rows by construction, and the same on every rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.learning.control import Control


class Ranks:
    """Who trains together: by default this process alone, which costs nothing."""

    def __init__(self, index: int = 0, count: int = 1, control: Control | None = None) -> None:
        """`index` of `count` in torch.distributed's default group. control: how rank 0 leads the others, if it does."""
        self.index = index
        self.count = count
        self._control = control

    @classmethod
    def joined(cls) -> Ranks:
        """All ranks of torch.distributed; each calls the same methods of its learner by itself."""
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else cls()

    def share(self, queries: Sequence[Tensor], responses: Sequence[Tensor]) -> Share:
        """Deal the rows out: the longest first, each to the rank that has the fewest tokens yet."""
        rows: list[list[int]] = [[] for _ in range(self.count)]
        tokens = [0] * self.count
        lengths = [len(query) + len(response) for query, response in zip(queries, responses, strict=True)]
        for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
            rank = tokens.index(min(tokens))
            rows[rank].append(row)
            tokens[rank] += lengths[row]
        return Share(self, queries, responses, [sorted(own) for own in rows])

    def hear(self) -> tuple[str, tuple[Any, ...]]:
        """On a rank that is led: what to call next, and with what. Raises RanksLostError when rank 0 is gone."""
        assert self._control is not None, "rank 0 leads"
        return self._control.hear()

    def end(self, code: int) -> None:
        """On rank 0: have those that it leads end with exit code `code`. Elsewhere nothing."""
        if self._control is not None and self.index == 0:
            self._control.end(code)

    @contextlib.contextmanager
    def together(self, method: str, *arguments: Any) -> Iterator[None]:
        """Around what every rank must do at once: if rank 0 leads, it has the others call the same of their learner."""
        if self._control is None or self.index > 0:
            yield
            return
        with self._control.telling(method, *arguments):
            yield


ALONE = Ranks()


@dataclass(frozen=True)
class Share:
    """The rows of one forward pass, dealt out to ranks."""

    ranks: Ranks
    queries: Sequence[Tensor]
    responses: Sequence[Tensor]
    dealt: Sequence[Sequence[int]]
    """The rows of each rank, in order."""

    @property
    def rows(self) -> Sequence[int]:
        """Those of this rank. One that got none computes the first row, for DDP and FSDP wait for every rank."""
        return self.dealt[self.ranks.index] or [0]

    @property
    def own_queries(self) -> list[Tensor]:
        """The prompts of `rows`."""
        return [self.queries[row] for row in self.rows]

    @property
    def own_responses(self) -> list[Tensor]:
        """The responses of `rows`."""
        return [self.responses[row] for row in self.rows]

    def everyones(self, own: Tensor) -> list[Tensor]:
        """[response tokens of `rows`, columns], row by row → [t_i, columns] for every row of every rank.

        Gradients flow into `own` alone: the sum over ranks of what each derives is the derivative.
        """
        if self.ranks.count == 1:
            return list(torch.split(own, [len(response) for response in self.responses]))
        lengths = [[len(self.responses[row]) for row in rows] for rows in self.dealt]
        gathered = _gather(own.detach() if self.dealt[self.ranks.index] else own.detach()[:0], [*map(sum, lengths)])
        if self.dealt[self.ranks.index]:
            gathered[self.ranks.index] = own
        by_row = {
            row: values
            for rank, rows in enumerate(self.dealt)
            for row, values in zip(rows, torch.split(gathered[rank], lengths[rank]), strict=True)
        }
        if not self.dealt[self.ranks.index]:
            # Nothing of value, but the backward pass has to reach this rank's parameters.
            by_row[0] = by_row[0] + 0.0 * own.sum(0)
        return [by_row[row] for row in range(len(self.responses))]


def _gather(own: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """[n, columns] with another n on every rank, as `sizes` says → one of every rank."""
    padded = own.new_zeros(max(sizes), *own.shape[1:])
    padded[: len(own)] = own
    everyones = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(everyones, padded)
    return [values[:size] for values, size in zip(everyones, sizes, strict=True)]
