"""What a PPO step trains on, as it comes from the rollout: ragged rows, checked by name."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RolloutBatch:
    """One PPO step's samples, every list in the same order. Sample i has q_i prompt and t_i response tokens.

    Raises ValueError, naming the field and the row, when rows are missing, empty, of the wrong shape or not finite.
    """

    queries: list[Tensor]
    """Prompt token ids, int64 [q_i], q_i >= 1."""
    responses: list[Tensor]
    """Sampled token ids, the terminating one included, int64 [t_i], t_i >= 1."""
    scores: Tensor
    """One reward per sample, [batch], finite."""
    response_masks: list[Tensor] | None = None
    """1 on the tokens to train on, 0 on the others (text that the policy did not write), [t_i]; None: all are 1."""
    token_rewards: list[Tensor] | None = None
    """Rewards for single tokens, added to what the score and the KL give, [t_i], finite."""
    reference_logprobs: list[Tensor] | None = None
    """The reference's log-probabilities at the training temperature, [t_i]; None: ask the learner's reference."""
    rollout_logprobs: list[Tensor] | None = None
    """Log-probabilities as sampled, at the training temperature, [t_i]."""
    staleness: Tensor | None = None
    """How many versions older than the weights trained on the oldest that sampled each response are, int64 [batch]."""

    def __post_init__(self) -> None:
        rows = len(self.queries)
        if rows == 0:
            raise ValueError("queries is empty: a PPO step needs at least one sample")
        if len(self.responses) != rows:
            raise ValueError(f"responses has {len(self.responses)} rows, queries has {rows}")
        if self.scores.shape != (rows,):
            raise ValueError(f"scores has shape {list(self.scores.shape)}, queries has {rows} rows")
        if not torch.isfinite(self.scores).all():
            row = int((~torch.isfinite(self.scores)).nonzero()[0])
            raise ValueError(f"scores[{row}] is {self.scores[row].item()}: a score must be finite")
        if self.staleness is not None and (self.staleness.shape != (rows,) or (self.staleness < 0).any()):
            raise ValueError(f"staleness is {self.staleness.tolist()}: it must be {rows} numbers of at least 0")
        for name, tokens in (("queries", self.queries), ("responses", self.responses)):
            for row, ids in enumerate(tokens):
                _check_token_ids(f"{name}[{row}]", ids)
        for name, values in (
            ("response_masks", self.response_masks),
            ("token_rewards", self.token_rewards),
            ("reference_logprobs", self.reference_logprobs),
            ("rollout_logprobs", self.rollout_logprobs),
        ):
            if values is not None:
                self._check_per_token(name, values)
        for row, mask in enumerate(self.response_masks or []):
            if not ((mask == 0) | (mask == 1)).all():
                raise ValueError(f"response_masks[{row}] holds something other than 0 and 1")
            if not mask.any():
                raise ValueError(f"response_masks[{row}] is all 0: the sample has no token to train on")

    def __len__(self) -> int:
        return len(self.queries)

    def _check_per_token(self, name: str, values: list[Tensor]) -> None:
        if len(values) != len(self.responses):
            raise ValueError(f"{name} has {len(values)} rows, responses has {len(self.responses)}")
        for row, (value, response) in enumerate(zip(values, self.responses, strict=True)):
            if value.shape != response.shape:
                raise ValueError(
                    f"{name}[{row}] has shape {list(value.shape)}, responses[{row}] has {response.numel()} tokens"
                )
            if not torch.isfinite(value).all():
                token = int((~torch.isfinite(value)).nonzero()[0])
                raise ValueError(f"{name}[{row}][{token}] is {value[token].item()}: it must be finite")


def _check_token_ids(name: str, ids: Tensor) -> None:
    if ids.dim() != 1:
        raise ValueError(f"{name} has shape {list(ids.shape)}: token ids are one-dimensional")
    if ids.numel() == 0:
        raise ValueError(f"{name} is empty: at least one token is needed")
    if ids.dtype != torch.int64:
        raise ValueError(f"{name} is {ids.dtype}: token ids are torch.int64")
