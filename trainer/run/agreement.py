"""Whether trainer and policy server compute the same log-probabilities, before the first step and in every step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from rlhf.logs import get_logger
from trainer.clients.fleet import PolicyFleet
from trainer.clients.policy import REFERENCE, ModelInfo, PolicyClient
from trainer.learning.learner import PPOLearner
from trainer.run.prompts import Prompt
from trainer.versions import WeightsVersion

_log = get_logger(__name__)

PROBE_PROMPTS = 8
_PROBE_TOKENS = 64
# Mean gaps that rounding does not reach: in float32 it makes some 1e-6 nats, in 16 bits, whose steps are a 256th
# (bfloat16) of a logit, some hundredths. Other weights make tenths and more.
_LIMIT_FLOAT32 = 1e-3
_LIMIT_16_BITS = 0.1


class DisagreementError(RuntimeError):
    """Trainer and policy server compute different log-probabilities of the same tokens."""


@dataclass(frozen=True)
class Probe:
    """Token sequences of real prompts, each cut in two: what is given, and what is scored."""

    queries: list[torch.Tensor]
    responses: list[torch.Tensor]

    @classmethod
    def of(cls, prompts: Iterable[Prompt]) -> Probe:
        """All but the first token of each prompt is scored; of one that has no other, this one again."""
        rows = [torch.tensor(prompt.token_ids[: 1 + _PROBE_TOKENS]) for prompt in prompts]
        return cls([row[:1] for row in rows], [row[1:] if len(row) > 1 else row for row in rows])

    def logprobs_by(self, learner: PPOLearner) -> torch.Tensor:
        """The trainer's log-probabilities of every scored token, one after the other."""
        return torch.cat(learner.logprobs(self.queries, self.responses))

    async def logprobs_at(
        self,
        policy: PolicyClient | PolicyFleet,
        served: ModelInfo,
        *,
        temperature: float,
        weights: WeightsVersion | None,
    ) -> torch.Tensor:
        """The same by the server; `weights` = which must be live."""
        pairs = [(query.tolist(), row.tolist()) for query, row in zip(self.queries, self.responses, strict=True)]
        scored: list[float] = []
        for rows in served.log_probs_groups([len(query) + len(row) for query, row in pairs], rows=len(pairs)):
            some = [pairs[row] for row in rows]
            answer = await policy.log_probs(served.model, some, temperature=temperature, weights=weights)
            scored.extend(value for row in answer for value in row)
        return torch.tensor(scored)


def gap_limit(given: float | None, computed_in: Iterable[str]) -> float:
    """The largest mean gap, in nats: what is given, else what rounding in these types may make."""
    if given is not None:
        return given
    return _LIMIT_FLOAT32 if set(computed_in) == {"float32"} else _LIMIT_16_BITS


class Agreement:
    """Compares the trainer's log-probabilities with the policy server's."""

    def __init__(
        self,
        policy: PolicyClient | PolicyFleet,
        probe: Probe,
        *,
        temperature: float,
        limit: float,
        models: Sequence[ModelInfo],
    ) -> None:
        """`models`: those of the server that must hold the trainer's weights."""
        self.probe = probe
        self._policy = policy
        self._temperature = temperature
        self._limit = limit
        self._models = models
        self._above = False

    async def require(self, ours: torch.Tensor, weights: WeightsVersion | None) -> str:
        """Say how far the server's log-probabilities of the probe lie from `ours` (`Probe.logprobs_by`).

        weights: which the policy must hold, None = whatever is live. Raises DisagreementError above the limit.
        """
        gaps = {}
        for served in self._models:
            theirs = await self.probe.logprobs_at(
                self._policy,
                served,
                temperature=self._temperature,
                weights=None if served.model == REFERENCE else weights,
            )
            gaps[served.model] = gap = (ours - theirs).abs().mean().item()
            if not gap <= self._limit:  # nor is NaN
                raise DisagreementError(
                    f"policy server {self._policy.target} computes other log-probabilities than the trainer: for the "
                    f"same tokens its {served.model}, served in {served.serving_dtype}, is {gap:.2g} nats off on "
                    f"average, more than --max-logprob-gap ({self._limit:g}). Serve in float32 (--dtype) with the "
                    "trainer's --model, or raise the limit if the server's type explains the gap"
                )
        return ", ".join(f"{model} {gap:.1e} nats apart" for model, gap in gaps.items()) + f" (limit {self._limit:g})"

    def watch(self, gap: float | None) -> None:
        """Take a step's mean gap between trainer and rollout; warn when it first exceeds the limit, each time anew."""
        if gap is None:
            return
        above = gap > self._limit
        if above and not self._above:
            _log.warning(
                "the policy server's log-probabilities drift from the trainer's: PPO's ratios are off by as much",
                gap_nats=round(gap, 6),
                max_logprob_gap=self._limit,
            )
        elif self._above and not above:
            _log.info("the policy server's log-probabilities are near the trainer's again", gap_nats=round(gap, 6))
        self._above = above
