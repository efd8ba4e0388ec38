"""Log-probabilities and entropies from hidden states, never with a graph over positions × vocabulary.

The projection onto the vocabulary and the softmax go block by block, small enough to stay in a CPU's cache (Milakov
and Gimelshein 2018, "Online normalizer calculation for softmax"). What the gradient needs are the blocks' exponentials:
they are kept while they fit into a budget, and computed again otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_POSITIONS, _COLUMNS = 512, 4096
_KEPT_BYTES = 2**28


def head_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """The log-probability of each token, and the entropy in nats of the distribution it is from.

    hidden: [N, width]; weight: [vocabulary, width]; bias: [vocabulary]; tokens: int64 [N]. Logits are
    (hidden · weightᵀ + bias) / temperature. Both results are fp32 [N]; the entropy has no gradient.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    logprobs, entropies = _HeadLogprobs.apply(hidden, weight, bias, tokens, temperature)  # type: ignore[no-untyped-call]
    return logprobs, entropies


@dataclass(frozen=True)
class _Block:
    """Some positions by some columns of the vocabulary."""

    rows: slice
    columns: slice
    highest: Tensor
    """[rows]: what was taken from the logits before their exponentials: the highest up to these columns."""
    exponentials: Tensor | None
    """fp32 [rows, columns], if kept."""


class _HeadLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        blocks: list[_Block] = []
        logprobs, entropies, peaks, totals = hidden.new_empty((4, len(hidden)), dtype=torch.float32)
        budget = _KEPT_BYTES if any(ctx.needs_input_grad) else 0
        for rows in _cut(len(hidden), _POSITIONS):
            highest = torch.full_like(logprobs[rows], torch.finfo(torch.float32).min)
            total, weighted, chosen = (torch.zeros_like(highest) for _ in range(3))
            for columns in _cut(len(weight), _COLUMNS):
                logits = _logits(hidden[rows], weight, bias, columns, temperature)
                inside, column = _find(tokens[rows], columns)
                chosen = torch.where(inside, logits.gather(1, column).squeeze(1), chosen)
                before, highest = highest, torch.maximum(highest, logits.amax(1))
                shift = before - highest
                logits -= highest[:, None]
                exponentials = logits.exp()
                weighted = (weighted + total * shift) * shift.exp() + torch.linalg.vecdot(exponentials, logits)
                total = total * shift.exp() + exponentials.sum(1)
                budget -= exponentials.nbytes
                blocks.append(_Block(rows, columns, highest, exponentials if budget >= 0 else None))
            peaks[rows], totals[rows] = highest, total
            logprobs[rows] = (chosen - highest) - total.log()
            entropies[rows] = total.log() - weighted / total
        ctx.save_for_backward(hidden, weight, bias, tokens, peaks, totals)
        ctx.blocks, ctx.temperature = blocks, temperature
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _entropies: Tensor) -> tuple[Tensor | None, ...]:
        """∂ log p(token) / ∂ logits = [is the token] − p."""
        hidden, weight, bias, tokens, peaks, totals = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        by_hidden = torch.zeros_like(hidden) if needs_hidden else None
        by_weight = torch.empty_like(weight) if needs_weight else None
        by_bias = torch.zeros_like(bias) if needs_bias else None
        gradient = gradient / ctx.temperature
        blocks: list[_Block] = ctx.blocks
        while blocks:
            block = blocks.pop(0)
            rows, columns = block.rows, block.columns
            terms = block.exponentials
            if terms is None:
                logits = _logits(hidden[rows], weight, bias, columns, ctx.temperature)
                terms = logits.sub_(block.highest[:, None]).exp_()
            terms *= (-gradient[rows] * (block.highest - peaks[rows]).exp() / totals[rows])[:, None]
            inside, column = _find(tokens[rows], columns)
            own = terms.gather(1, column) + (gradient[rows] * inside)[:, None]
            terms.scatter_(1, column, own)
            terms = terms.to(hidden.dtype)
            if by_hidden is not None:
                by_hidden[rows].addmm_(terms, weight[columns])
            if by_weight is not None:
                torch.addmm(
                    by_weight[columns], terms.t(), hidden[rows], beta=float(rows.start > 0), out=by_weight[columns]
                )
            if by_bias is not None:
                by_bias[columns] += terms.sum(0)
        return by_hidden, by_weight, by_bias, None, None


def _cut(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, columns: slice, temperature: float) -> Tensor:
    """fp32, the caller's to change."""
    logits = (hidden @ weight[columns].t()).float()
    if bias is not None:
        logits += bias[columns]
    return logits if temperature == 1.0 else logits.div_(temperature)


def _find(tokens: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """bool [rows]: whose token is among the columns; int64 [rows, 1]: where, or anywhere if it is not."""
    column = tokens - columns.start
    width = columns.stop - columns.start
    return (column >= 0) & (column < width), column.clamp(0, width - 1)[:, None]
