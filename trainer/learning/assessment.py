"""What policy and reference think of a batch before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.learning.ranks import ALONE, Ranks, Share
from trainer.ppo.kl import full_kl
from trainer.ppo.logprobs import token_logprobs
from trainer.responses.rows import ResponseRows, collate
from trainer.responses.scoring import (
    PackedReference,
    distribution_and_values,
    logprobs_under,
    response_distribution,
    scores_and_values,
)

_NOT_ASKED = torch.empty(0, 0)


@dataclass(frozen=True)
class Assessment:
    """Every tensor [batch, time] fp32, 0 on padding; empty where there was no model to ask."""

    logprobs: Tensor = _NOT_ASKED
    """The policy's log-probabilities of the response tokens."""
    values: Tensor = _NOT_ASKED
    """The value of the state before each response token."""
    reference_logprobs: Tensor | None = None
    """The reference's, if there is a reference."""
    full_kl: Tensor | None = None
    """KL(policy ‖ reference) of whole distributions, if asked for."""


@torch.no_grad()
def assess(
    model: nn.Module | None,
    reference: nn.Module | None,
    queries: Sequence[Tensor],
    responses: Sequence[Tensor],
    *,
    temperature: float,
    with_full_kl: bool,
    packed: bool,
    mini_batch_size: int,
    pad_id: int,
    device: torch.device,
    ranks: Ranks = ALONE,
) -> Assessment:
    """Forward the batch once through `model` (with value head) and `reference`, `mini_batch_size` rows at a time.

    packed: whether `model` reads packed rows; `with_full_kl` it gets padded ones all the same, since it needs whole
    distributions, which never leave a mini-batch. ranks: who shares the rows of each mini-batch.
    """
    found: dict[str, list[Tensor]] = {}
    for start in range(0, len(queries), mini_batch_size):
        chosen = slice(start, start + mini_batch_size)
        share = ranks.share(queries[chosen], responses[chosen])

        def rows_of(*, packed: bool, share: Share = share) -> ResponseRows:
            return collate(share.own_queries, share.own_responses, packed=packed, pad_id=pad_id, device=device)

        columns: dict[str, Tensor] = {}
        if with_full_kl:
            assert model is not None
            assert reference is not None
            rows = rows_of(packed=False)
            distribution, columns["values"] = distribution_and_values(model, rows, temperature)
            other = response_distribution(reference, rows, temperature)
            columns["logprobs"] = token_logprobs(distribution, rows.tokens)
            columns["reference_logprobs"] = token_logprobs(other, rows.tokens)
            columns["full_kl"] = full_kl(distribution, other)
        else:
            if model is not None:
                rows = rows_of(packed=packed)
                columns["logprobs"], _, columns["values"] = scores_and_values(model, rows, temperature)
            if reference is not None:
                rows = rows_of(packed=isinstance(reference, PackedReference))
                columns["reference_logprobs"] = logprobs_under(reference, rows, temperature)
        for row in share.everyones(torch.stack([column.float() for column in columns.values()], dim=-1)):
            for name, values in zip(columns, row.unbind(-1), strict=True):
                found.setdefault(name, []).append(values)
    return Assessment(**{name: pad_rows(rows, device) for name, rows in found.items()})


def pad_rows(rows: Sequence[Tensor], device: torch.device) -> Tensor:
    """Rows [t_i] of any dtype → [batch, longest] fp32 on `device`, 0 on padding."""
    return nn.utils.rnn.pad_sequence([row.detach().to(device, torch.float32) for row in rows], batch_first=True)
