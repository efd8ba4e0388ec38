"""What the weights that were live must have made of each token, worked out again by plain transformers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from policy_server.engine.protocol import GenerationRequest, InFlight, Scores, ScoringRequest, WeightsVersion
from tests.policy_server.engine.harness import INITIAL, Gathered


@dataclass(frozen=True)
class Swap:
    """A version that was live: how it came, and all of its weights."""

    version: WeightsVersion
    in_flight: InFlight | None
    weights: Mapping[str, Tensor]


class Ledger:
    """Every version that was live, in order."""

    def __init__(self, model: PreTrainedModel) -> None:
        initial = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        self.swaps = [Swap(INITIAL, None, initial)]

    @property
    def names(self) -> list[str]:
        return list(self.swaps[0].weights)

    def record(self, version: WeightsVersion, in_flight: InFlight, tensors: Mapping[str, Tensor]) -> None:
        """Write down a swap; weights that it does not name stay as they were."""
        self.swaps.append(Swap(version, in_flight, {**self.swaps[-1].weights, **tensors}))

    def after(self, version: WeightsVersion) -> list[Swap]:
        """The swaps that replaced `version` and its successors."""
        versions = [swap.version for swap in self.swaps]
        return self.swaps[versions.index(version) + 1 :]

    def between(self, before: WeightsVersion, now: WeightsVersion) -> set[InFlight | None]:
        """How the versions after `before`, up to `now`, came."""
        return {swap.in_flight for swap in self.after(before) if swap.version <= now}


@dataclass(frozen=True)
class Segment:
    """Tokens start..end that one version sampled."""

    version: WeightsVersion
    start: int
    end: int


@dataclass
class Passage:
    """Tokens after their context, and the log-probabilities that were returned with them.

    epochs: each begins where the key-value cache was computed anew, by the weights of its first segment; the later
    segments of an epoch go on with the cache that the earlier ones left.
    """

    context: Sequence[int]
    tokens: Sequence[int]
    logprobs: Sequence[float]
    epochs: list[list[Segment]] = field(default_factory=list)


def scored(asked: ScoringRequest, scores: Scores) -> list[Passage]:
    """The sequences of a scoring request: all of one version, without a cache."""
    return [
        Passage(prompt, completion, logprobs, [[Segment(scores.weights, 0, len(completion))]])
        for (prompt, completion), logprobs in zip(asked.sequences, scores.logprobs, strict=True)
    ]


def generated(asked: GenerationRequest, completion: Gathered, ledger: Ledger) -> Passage:
    """A completion, its spans checked against the swaps that there were."""
    passage = Passage(
        [*asked.prompt_token_ids, *asked.completion_prefix], completion.token_ids, completion.raw_logprobs
    )
    before: WeightsVersion | None = None
    start = 0
    for span in completion.spans:
        came = set() if before is None else ledger.between(before, span.weights)
        assert not came & {InFlight.WAIT, InFlight.ABORT}, "a completion outlived a swap that it must not"
        assert before is None or came or span.weights == before, "older weights than before"
        if before is None or InFlight.RECOMPUTE in came:
            passage.epochs.append([])
        epoch = passage.epochs[-1]
        end = start + span.token_count
        if epoch and epoch[-1].version == span.weights:
            epoch[-1] = Segment(span.weights, epoch[-1].start, end)
        else:
            epoch.append(Segment(span.weights, start, end))
        oldest = epoch[0].version
        assert span.oldest_cache == (oldest if oldest != span.weights else None), "another oldest entry"
        before, start = span.weights, end
    assert start == len(completion.token_ids) == len(completion.raw_logprobs), "spans do not tile the tokens"
    return passage


def largest_difference(passages: Iterable[Passage], ledger: Ledger, model: PreTrainedModel) -> float:
    """The largest difference between a returned log-probability and the one that its version's weights give."""
    fresh: dict[WeightsVersion, list[tuple[Passage, Segment]]] = defaultdict(list)
    kept: dict[WeightsVersion, list[tuple[Passage, Segment, DynamicCache]]] = defaultdict(list)
    for passage in passages:
        for epoch in passage.epochs:
            cache = DynamicCache()
            for segment in epoch:
                if len(epoch) == 1:
                    fresh[segment.version].append((passage, segment))
                else:
                    kept[segment.version].append((passage, segment, cache))
    worst = 0.0
    for swap in ledger.swaps:  # in order, so that each cache is filled by one version after another
        with torch.inference_mode():
            for name, parameter in model.named_parameters():
                parameter.copy_(swap.weights[name])
            differences = _differences(model, fresh.pop(swap.version, []))
            for passage, segment, cache in kept.pop(swap.version, []):
                differences += _differences(model, [(passage, segment)], cache)
        worst = max([worst, *differences])
    assert not fresh, "tokens of weights that were never live"
    assert not kept, "tokens of weights that were never live"
    return worst


def _differences(
    model: PreTrainedModel, given: Sequence[tuple[Passage, Segment]], cache: DynamicCache | None = None
) -> list[float]:
    """For every token of the segments: one forward over everything before it that is not in the cache."""
    if not given:
        return []
    first = cache.get_seq_length() if cache is not None else 0
    inputs = [
        [*passage.context, *passage.tokens][first : len(passage.context) + segment.end - 1]
        for passage, segment in given
    ]
    width = max(map(len, inputs))
    padded = torch.tensor([each + [0] * (width - len(each)) for each in inputs])
    logprobs = model(padded, past_key_values=cache, use_cache=cache is not None).logits.log_softmax(dim=-1)
    differences: list[float] = []
    for row, (passage, segment) in enumerate(given):
        at = len(passage.context) + segment.start - 1 - first
        tokens = torch.tensor(passage.tokens[segment.start : segment.end])
        expected = logprobs[row, at : at + len(tokens)].gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        returned = torch.tensor(passage.logprobs[segment.start : segment.end])
        differences += (expected - returned).abs().tolist()
    return differences
