"""What policy and reference think of a batch before anything is trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.learning.forward import ResponseRows, collate, response_distribution, response_distribution_and_values
from trainer.ppo.kl import full_kl
from trainer.ppo.logprobs import token_logprobs


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
    mini_batch_size: int,
    pad_id: int,
    device: torch.device,
) -> Assessment:
    """Forward the batch once through `model` (with value head) and `reference`, `mini_batch_size` rows at a time.

    Whole distributions never leave a mini-batch.
    """
    logprobs: list[Tensor] = []
    values: list[Tensor] = []
    reference_logprobs: list[Tensor] = []
    kl: list[Tensor] = []
    for start in range(0, len(queries), mini_batch_size):
        chosen = slice(start, start + mini_batch_size)
        rows = collate(queries[chosen], responses[chosen], pad_id=pad_id, device=device)
        distribution, row_values = response_distribution_and_values(model, rows, temperature)
        logprobs.extend(_unpacked(rows, token_logprobs(distribution, rows.tokens)))
        values.extend(_unpacked(rows, row_values))
        if reference is not None:
            other = response_distribution(reference, rows, temperature)
            reference_logprobs.extend(_unpacked(rows, token_logprobs(other, rows.tokens)))
            if with_full_kl:
                kl.extend(_unpacked(rows, full_kl(distribution, other)))
    return Assessment(
        logprobs=pad_rows(logprobs, device),
        values=pad_rows(values, device),
        reference_logprobs=pad_rows(reference_logprobs, device) if reference_logprobs else None,
        full_kl=pad_rows(kl, device) if kl else None,
    )


def pad_rows(rows: Sequence[Tensor], device: torch.device) -> Tensor:
    """Rows [t_i] of any dtype → [batch, longest] fp32 on `device`, 0 on padding."""
    return nn.utils.rnn.pad_sequence([row.detach().to(device, torch.float32) for row in rows], batch_first=True)


def _unpacked(rows: ResponseRows, packed: Tensor) -> Iterator[Tensor]:
    """[N] → one [t_i] per row."""
    return iter(torch.split(packed, rows.mask.sum(1).tolist()))
