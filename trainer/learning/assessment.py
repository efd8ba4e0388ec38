"""What policy and reference think of a batch before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

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


@dataclass(frozen=True)
class Assessment:
    """Every tensor [batch, time] fp32, 0 on padding."""

    logprobs: Tensor
    """The policy's log-probabilities of the response tokens."""
    values: Tensor
    """The value of the state before each response token."""
    reference_logprobs: Tensor | None
    """The reference's, if there is a reference."""
    full_kl: Tensor | None
    """KL(policy ‖ reference) of whole distributions, if asked for."""


@torch.no_grad()
def assess(
    model: nn.Module,
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
) -> Assessment:
    """Forward the batch once through `model` (with value head) and `reference`, `mini_batch_size` rows at a time.

    packed: whether `model` reads packed rows; `with_full_kl` it gets padded ones all the same, since it needs whole
    distributions, which never leave a mini-batch.
    """
    logprobs: list[Tensor] = []
    values: list[Tensor] = []
    reference_logprobs: list[Tensor] = []
    kl: list[Tensor] = []
    for start in range(0, len(queries), mini_batch_size):
        chosen = slice(start, start + mini_batch_size)

        def rows_of(*, packed: bool, chosen: slice = chosen) -> ResponseRows:
            return collate(queries[chosen], responses[chosen], packed=packed, pad_id=pad_id, device=device)

        if with_full_kl:
            assert reference is not None
            rows = rows_of(packed=False)
            distribution, row_values = distribution_and_values(model, rows, temperature)
            other = response_distribution(reference, rows, temperature)
            logprobs.extend(rows.unpacked(token_logprobs(distribution, rows.tokens)))
            values.extend(rows.unpacked(row_values))
            reference_logprobs.extend(rows.unpacked(token_logprobs(other, rows.tokens)))
            kl.extend(rows.unpacked(full_kl(distribution, other)))
            continue
        rows = rows_of(packed=packed)
        row_logprobs, _, row_values = scores_and_values(model, rows, temperature)
        logprobs.extend(rows.unpacked(row_logprobs))
        values.extend(rows.unpacked(row_values))
        if reference is not None:
            rows = rows_of(packed=isinstance(reference, PackedReference))
            reference_logprobs.extend(rows.unpacked(logprobs_under(reference, rows, temperature)))
    return Assessment(
        logprobs=pad_rows(logprobs, device),
        values=pad_rows(values, device),
        reference_logprobs=pad_rows(reference_logprobs, device) if reference_logprobs else None,
        full_kl=pad_rows(kl, device) if kl else None,
    )


def pad_rows(rows: Sequence[Tensor], device: torch.device) -> Tensor:
    """Rows [t_i] of any dtype → [batch, longest] fp32 on `device`, 0 on padding."""
    return nn.utils.rnn.pad_sequence([row.detach().to(device, torch.float32) for row in rows], batch_first=True)
