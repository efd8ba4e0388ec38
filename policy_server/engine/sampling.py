"""From logits to tokens: the settings in transformers' order and semantics, and random numbers by position.

The k-th token of a completion is drawn with a number that depends on the completion's seed and on k alone, so a
completion is the same in any batch, and one that was cut can go on where it stopped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from policy_server.engine.protocol import Sampling

SEEDS = 2**64

# Logits divided by less overflow; their distribution is on the most likely token well before.
SMALLEST_TEMPERATURE = 1e-30
_LARGEST_PENALISED = 1e8  # finite also after division by the smallest temperature

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_BLOCK = 256


@dataclass(frozen=True)
class Draw:
    """How one row of logits becomes one token.

    seed: of this completion, (request's seed + completion's index) mod 2^64. position: tokens of the completion
    before this one. ending_ids: EOS and stop tokens, impossible before min_new_tokens. seen: bool [vocab], true for
    the tokens of prompt and completion; None where repetition_penalty is 1.
    """

    sampling: Sampling
    seed: int
    position: int
    ending_ids: tuple[int, ...] = ()
    seen: Tensor | None = None
    raw_logprob: bool = False
    processed_logprob: bool = False

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.sampling.temperature == 0.0


@dataclass(frozen=True)
class Drawn:
    """One entry per row; a log-probability is None where not asked for, `valid` False where logits were not finite."""

    token_ids: list[int]
    raw_logprobs: list[float | None]
    processed_logprobs: list[float | None]
    valid: list[bool]


def draw(logits: Tensor, draws: Sequence[Draw]) -> Drawn:
    """Sample one token per row of `logits` [rows, vocab], any dtype; log-probabilities are computed in float32."""
    raw = logits.float()
    scores = process(raw, draws)
    token_ids, logprobs, valid = _choose(scores, draws)
    raw_logprobs: list[float] = []
    if any(each.raw_logprob for each in draws):
        raw_logprobs = _raw_logprobs(raw, token_ids)
    processed_logprobs: list[float] = logprobs.tolist()
    return Drawn(
        token_ids=token_ids.tolist(),
        raw_logprobs=[raw_logprobs[row] if each.raw_logprob else None for row, each in enumerate(draws)],
        processed_logprobs=[
            processed_logprobs[row] if each.processed_logprob else None for row, each in enumerate(draws)
        ],
        valid=valid.tolist(),
    )


def process(scores: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Apply every setting: [rows, vocab] float32 in and out; impossible tokens are -inf.

    Order and semantics are those of transformers' LogitsProcessors: repetition penalty, minimum new tokens,
    temperature, top-k, top-p, min-p. Greedy rows keep temperature 1 and are not cut: neither moves the maximum.
    """
    settings = [each.sampling for each in draws]
    sampled = [not each.greedy for each in draws]
    vocab = scores.shape[-1]
    scores = _where(scores, [each.seen is not None for each in draws], lambda x, rows: _penalise(x, draws, rows))
    scores = _where(
        scores,
        [each.position < each.sampling.min_new_tokens for each in draws],
        lambda x, rows: _forbid(x, [draws[row].ending_ids for row in rows]),
    )
    scores = _where(
        scores,
        [on and each.temperature != 1.0 for on, each in zip(sampled, settings, strict=True)],
        lambda x, rows: x / _column(x, [max(settings[row].temperature, SMALLEST_TEMPERATURE) for row in rows]),
    )
    scores = _where(
        scores,
        [on and 0 < each.top_k < vocab for on, each in zip(sampled, settings, strict=True)],
        lambda x, rows: _top_k(x, [settings[row].top_k for row in rows]),
    )
    scores = _where(
        scores,
        [on and each.top_p < 1.0 for on, each in zip(sampled, settings, strict=True)],
        lambda x, rows: _top_p(x, [settings[row].top_p for row in rows]),
    )
    return _where(
        scores,
        [on and each.min_p > 0.0 for on, each in zip(sampled, settings, strict=True)],
        lambda x, rows: _min_p(x, [settings[row].min_p for row in rows]),
    )


def uniforms(seeds: npt.NDArray[np.uint64], positions: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """Numbers in [0, 1) with 53 random bits, each a pure function of its (seed, position).

    SplitMix64 (Steele, Lea & Flood 2014) read at index `position`; its start is the seed's own hash, so that
    neighbouring seeds share no part of their streams.
    """
    start = _mix(_mix(seeds) + _GAMMA)
    bits = _mix(start + (positions + np.uint64(1)) * _GAMMA)
    result: npt.NDArray[np.float64] = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return result


def inverse_cdf(scores: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The first token whose cumulative probability exceeds `uniform`, and its log-probability.

    Returns token ids int64 [rows], log-probabilities float32 [rows], and valid bool [rows].

    scores: [rows, vocab] float32, -inf = impossible; uniform: [rows] float64 in [0, 1]. Sums of blocks of tokens are
    accumulated first, then the tokens of the one that is met, both in float64: that reads a large vocabulary once. The
    target stays below the total, and a token of probability 0 is never chosen.
    """
    probabilities = torch.softmax(scores, dim=-1)
    vocab = scores.shape[-1]
    blocks = [block.sum(dim=-1) for block in _blocks(probabilities)]
    cumulative = torch.cat(blocks, dim=-1).double().cumsum(dim=-1)
    total = cumulative[:, -1]
    valid = torch.isfinite(total) & (total > 0)
    below = torch.nextafter(total, torch.zeros_like(total))
    target = torch.minimum(uniform * total, below).unsqueeze(-1)
    block = torch.searchsorted(cumulative, target, right=True).clamp(max=cumulative.shape[-1] - 1)
    before = torch.where(block > 0, cumulative.gather(-1, (block - 1).clamp(min=0)), 0.0)
    tokens = block * _BLOCK + torch.arange(_BLOCK, device=scores.device)
    within = probabilities.gather(-1, tokens.clamp(max=vocab - 1)).masked_fill(tokens >= vocab, 0.0).double()
    place = torch.searchsorted(within.cumsum(dim=-1), target - before, right=True)
    # A block's sum and its tokens' may differ in the last bits: then it is the last token that can be.
    last = torch.where(within > 0, torch.arange(_BLOCK, device=scores.device), 0).amax(dim=-1, keepdim=True)
    token_ids = (block * _BLOCK + torch.minimum(place, last)).clamp(max=vocab - 1)
    return token_ids.squeeze(-1), probabilities.gather(-1, token_ids).squeeze(-1).log(), valid


def _blocks(probabilities: Tensor) -> Iterator[Tensor]:
    """[rows, blocks, _BLOCK] of all whole blocks, then [rows, 1, rest]."""
    rows, vocab = len(probabilities), probabilities.shape[-1]
    whole = vocab // _BLOCK * _BLOCK
    if whole:
        yield probabilities[:, :whole].view(rows, -1, _BLOCK)
    if whole < vocab:
        yield probabilities[:, whole:].unsqueeze(1)


def _choose(scores: Tensor, draws: Sequence[Draw]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, the logarithms of the probabilities that they were taken with, and which scores are numbers."""
    greedy = [each.greedy for each in draws]
    if all(greedy):
        best, token_ids = scores.max(dim=-1)
        return token_ids, torch.zeros_like(best), torch.isfinite(best)
    seeds = np.array([each.seed % SEEDS for each in draws], dtype=np.uint64)
    positions = np.array([each.position for each in draws], dtype=np.uint64)
    uniform = torch.from_numpy(uniforms(seeds, positions)).to(scores.device)
    token_ids, logprobs, valid = inverse_cdf(scores, uniform)
    if any(greedy):
        certain = torch.tensor(greedy, device=scores.device)
        token_ids = torch.where(certain, scores.argmax(dim=-1), token_ids)
        logprobs = logprobs.masked_fill(certain, 0.0)
    return token_ids, logprobs, valid


def _raw_logprobs(logits: Tensor, token_ids: Tensor) -> list[float]:
    chosen = logits.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    logprobs: list[float] = (chosen - torch.logsumexp(logits, dim=-1)).tolist()
    return logprobs


def _where(scores: Tensor, wanted: Sequence[bool], apply: Callable[[Tensor, list[int]], Tensor]) -> Tensor:
    """Apply a setting to the rows that have it, and do no vocabulary-sized work when none has."""
    rows = [row for row, want in enumerate(wanted) if want]
    if not rows:
        return scores
    if len(rows) == len(wanted):
        return apply(scores, rows)
    index = torch.tensor(rows, device=scores.device)
    return scores.index_copy(0, index, apply(scores[index], rows))


def _column(like: Tensor, values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).to(device=like.device, dtype=like.dtype).unsqueeze(-1)


def _penalise(scores: Tensor, draws: Sequence[Draw], rows: Sequence[int]) -> Tensor:
    seen = torch.stack([mask for row in rows if (mask := draws[row].seen) is not None]).to(scores.device)
    penalty = _column(scores, [draws[row].sampling.repetition_penalty for row in rows])
    penalised = torch.where(scores < 0, scores * penalty, scores / penalty)
    penalised = penalised.clamp(min=-_LARGEST_PENALISED, max=_LARGEST_PENALISED)
    return torch.where(seen & scores.isfinite(), penalised, scores)


def _forbid(scores: Tensor, token_ids: Sequence[tuple[int, ...]]) -> Tensor:
    places = [row * scores.shape[-1] + token_id for row, ids in enumerate(token_ids) for token_id in ids]
    index = torch.tensor(places, dtype=torch.long, device=scores.device)
    return scores.flatten().index_fill(0, index, -math.inf).view_as(scores)


def _top_k(scores: Tensor, k: Sequence[int]) -> Tensor:
    best = torch.topk(scores, max(k), dim=-1).values
    smallest = best.gather(-1, torch.tensor(k, device=scores.device).unsqueeze(-1) - 1)
    return scores.masked_fill(scores < smallest, -math.inf)


def _top_p(scores: Tensor, p: Sequence[float]) -> Tensor:
    ordered, order = torch.sort(scores, descending=False)
    removed = ordered.softmax(dim=-1).cumsum(dim=-1) <= _column(scores, [1 - each for each in p])
    removed[:, -1:] = False
    return scores.masked_fill(removed.scatter(1, order, removed), -math.inf)


def _min_p(scores: Tensor, p: Sequence[float]) -> Tensor:
    probabilities = torch.softmax(scores, dim=-1)
    best, most_likely = probabilities.max(dim=-1, keepdim=True)
    removed = (probabilities < _column(scores, p) * best).scatter(-1, most_likely, False)
    return scores.masked_fill(removed, -math.inf)


def _mix(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
