"""What callers wait for beside generations: scores and swaps, as the engine's thread sees them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from policy_server.engine.model import ServedModel
from policy_server.engine.protocol import InFlight, Scores, ScoringRequest, WeightsVersion
from policy_server.engine.scoring import MicroBatch, SequenceScore


@dataclass(eq=False)
class ScoringJob:
    """A request for scores and what is done of it; all of it is done under one version, or again."""

    request: ScoringRequest
    model: ServedModel
    plan: list[MicroBatch]
    future: asyncio.Future[Scores]
    scores: dict[int, SequenceScore] = field(default_factory=dict)
    finished: int = 0  # micro-batches
    cancelled: bool = False

    def restart(self) -> None:
        """Forget everything that was computed."""
        self.scores.clear()
        self.finished = 0

    def result(self) -> Scores:
        """The scores in the request's order."""
        ordered = [self.scores[place] for place in range(len(self.request.sequences))]
        return Scores(
            logprobs=[logprobs for logprobs, _ in ordered],
            entropies=[entropies for _, entropies in ordered],
            weights=self.model.version,
        )


@dataclass(eq=False)
class SwapJob:
    """New weights that wait for their moment."""

    tensors: Mapping[str, Tensor]
    version: WeightsVersion
    if_current: WeightsVersion | None
    in_flight: InFlight
    future: asyncio.Future[WeightsVersion]
    cancelled: bool = False
