"""Log-probabilities of given tokens, without ever holding logits of batch × time × vocabulary."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from policy_server.engine.model import ServedModel
from policy_server.engine.protocol import ScoringRequest
from policy_server.engine.sampling import SMALLEST_TEMPERATURE
from rlhf import failures

_MOST_LOGITS = 2**24  # elements of one piece of logits: 64 MiB in float32

SequenceScore = tuple[list[float], list[float]]


@dataclass(frozen=True)
class MicroBatch:
    """Places in the request's sequences that one forward scores, longest first."""

    sequences: tuple[int, ...]


def plan(request: ScoringRequest, *, max_tokens: int, one_by_one: bool) -> list[MicroBatch]:
    """Cut a request into micro-batches of similar lengths, of at most `max_tokens` padded tokens or one sequence.

    one_by_one: no sequence shares a forward, so that its scores depend on nothing else.
    """
    lengths = [len(prompt) + len(completion) for prompt, completion in request.sequences]
    order = sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))
    batches: list[list[int]] = []
    for place in order:
        full = not batches or one_by_one or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > max_tokens
        if full:
            batches.append([])
        batches[-1].append(place)
    return [MicroBatch(tuple(batch)) for batch in batches]


class Scorer:
    """Scores with one model. Hidden states come first; logits only for completion tokens, piece by piece."""

    def __init__(self, model: ServedModel) -> None:
        self._model = model
        self._splits = _splits(model)

    def score(self, request: ScoringRequest, batch: MicroBatch) -> dict[int, SequenceScore]:
        """Log-probabilities and (if asked for) entropies of a micro-batch, by place in the request.

        Raises internal when one of them is not finite.
        """
        pairs = [request.sequences[place] for place in batch.sequences]
        hidden_rows = self._hidden_rows(pairs) if self._splits else None
        targets = torch.tensor([token for _, completion in pairs for token in completion], device=self._model.device)
        logprobs: list[float] = []
        entropies: list[float] = []
        pieces = self._head(hidden_rows) if hidden_rows is not None else self._whole(pairs)
        temperature = max(request.temperature, SMALLEST_TEMPERATURE)
        start = 0
        for logits in pieces:
            distribution = torch.log_softmax(logits.float() / temperature, dim=-1)
            piece = targets[start : start + len(logits)].unsqueeze(-1)
            logprobs += distribution.gather(-1, piece).squeeze(-1).tolist()
            if request.entropies:
                # A token of probability 0 adds nothing; -inf × 0 would add NaN.
                entropies += (-(distribution.exp() * distribution).nan_to_num(nan=0.0).sum(dim=-1)).tolist()
            start += len(logits)
        if not all(map(math.isfinite, [*logprobs, *entropies])):
            raise failures.internal("the model's logits are not finite")
        result: dict[int, SequenceScore] = {}
        start = 0
        for place, (_, completion) in zip(batch.sequences, pairs, strict=True):
            end = start + len(completion)
            result[place] = (logprobs[start:end], entropies[start:end])
            start = end
        return result

    def _hidden_rows(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Tensor:
        """Last hidden states at the positions before each completion token: [completion tokens, width]."""
        token_ids, mask = _right_padded(pairs, self._model.device)
        hidden = _hidden(self._model, token_ids, mask)
        rows = [
            (row, position)
            for row, (prompt, completion) in enumerate(pairs)
            for position in range(len(prompt) - 1, len(prompt) + len(completion) - 1)
        ]
        index = torch.tensor(rows, device=self._model.device)
        return hidden[index[:, 0], index[:, 1]]

    def _head(self, hidden_rows: Tensor) -> Iterator[Tensor]:
        size = max(_MOST_LOGITS // self._model.vocab_size, 1)
        for piece in torch.split(hidden_rows, size):
            yield _logits_of(self._model, piece)

    def _whole(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Iterator[Tensor]:
        """Logits by the model's own forward, one sequence at a time, for architectures that can't be split."""
        for prompt, completion in pairs:
            token_ids, mask = _right_padded([(prompt, completion)], self._model.device)
            yield self._model.logits(token_ids, mask, keep=len(completion) + 1)[0, :-1]


def _right_padded(pairs: Sequence[tuple[Sequence[int], Sequence[int]]], device: torch.device) -> tuple[Tensor, Tensor]:
    sequences = [[*prompt, *completion] for prompt, completion in pairs]
    width = max(map(len, sequences))
    token_ids = torch.tensor([each + [0] * (width - len(each)) for each in sequences], device=device)
    lengths = torch.tensor([len(each) for each in sequences], device=device)
    return token_ids, (torch.arange(width, device=device) < lengths.unsqueeze(-1)).long()


def _hidden(model: ServedModel, token_ids: Tensor, mask: Tensor) -> Tensor:
    hidden: Tensor = model.module.base_model(**model.inputs(token_ids, mask), use_cache=False).last_hidden_state
    return hidden


def _logits_of(model: ServedModel, hidden: Tensor) -> Tensor:
    """What the model's own forward makes of hidden states [tokens, width]: [tokens, vocab].

    It runs with the layers replaced by the given states, and so does all that architectures do around their head
    (soft-capping, scaling, a bias) without our knowing of it.
    """
    with _layers_replaced(model.module, _Given(hidden.unsqueeze(0))):
        token_ids = torch.zeros((1, len(hidden)), dtype=torch.long, device=hidden.device)
        logits: Tensor = model.module(input_ids=token_ids, use_cache=False).logits
    return logits[0]


@dataclass
class _HiddenOnly(BaseModelOutputWithPastAndCrossAttentions):
    """What layers return, for a forward that passes on what it doesn't need."""

    router_logits: tuple[Tensor, ...] | None = None


class _Given(nn.Module):
    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self._hidden = hidden

    def forward(self, *_: object, **__: object) -> _HiddenOnly:
        return _HiddenOnly(last_hidden_state=self._hidden)


@contextmanager
def _layers_replaced(module: nn.Module, replacement: nn.Module) -> Iterator[None]:
    name = str(module.base_model_prefix)
    layers = getattr(module, name)
    setattr(module, name, replacement)
    try:
        yield
    finally:
        setattr(module, name, layers)


def _splits(model: ServedModel) -> bool:
    """Whether layers and head, run apart, give the model's own logits; tried on a few tokens."""
    token_ids = torch.arange(8, device=model.device).unsqueeze(0) % model.vocab_size
    mask = torch.ones_like(token_ids)
    with torch.inference_mode():
        whole = model.logits(token_ids, mask, keep=token_ids.shape[-1])[0].float()
        try:
            apart = _logits_of(model, _hidden(model, token_ids, mask)[0]).float()
        except (AttributeError, TypeError, KeyError, IndexError, ValueError, RuntimeError):
            return False  # an architecture that reaches into its layers by name, or wants more than hidden states
    if apart.shape != whole.shape:
        return False
    tolerance = 1e-4 * float(whole.nan_to_num().abs().max())
    return torch.allclose(apart, whole, rtol=1e-4, atol=tolerance, equal_nan=True)
