"""Forward passes over prompt + response rows that return what happens at the response tokens alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.ppo.logprobs import log_distribution


@dataclass(frozen=True)
class ResponseRows:
    """Samples padded on the right, and where their response tokens lie. L = longest row, T = longest response."""

    input_ids: Tensor
    """int64 [batch, L]."""
    attention_mask: Tensor
    """int64 [batch, L], 1 on tokens."""
    mask: Tensor
    """bool [batch, T], True on response tokens."""
    tokens: Tensor
    """int64 [N]: the N response tokens of all rows, packed row by row."""
    first: int
    """Position whose logits are the first that any row needs."""
    where: Tensor
    """int64 [N]: index of the position *before* each response token in a flattened [batch, L − 1 − first]."""

    def padded(self, packed: Tensor) -> Tensor:
        """[N] → [batch, T], 0 on padding."""
        return packed.new_zeros(self.mask.shape).masked_scatter(self.mask, packed)


def collate(
    queries: Sequence[Tensor], responses: Sequence[Tensor], *, pad_id: int, device: torch.device
) -> ResponseRows:
    """Rows of query + response, padded on the right, on `device`. Every query and response has at least one token."""
    query_lengths = torch.tensor([len(query) for query in queries])
    lengths = query_lengths + torch.tensor([len(response) for response in responses])
    rows, longest = len(queries), int(lengths.max())
    input_ids = torch.full((rows, longest), pad_id, dtype=torch.int64)
    for row, (query, response) in enumerate(zip(queries, responses, strict=True)):
        input_ids[row, : lengths[row]] = torch.cat([query, response])
    positions = torch.arange(longest)
    first = int(query_lengths.min()) - 1
    before_response = (positions >= query_lengths[:, None] - 1) & (positions < lengths[:, None] - 1)
    response_lengths = lengths - query_lengths
    return ResponseRows(
        input_ids=input_ids.to(device),
        attention_mask=(positions < lengths[:, None]).long().to(device),
        mask=(torch.arange(int(response_lengths.max())) < response_lengths[:, None]).to(device),
        tokens=torch.cat(list(responses)).to(device),
        first=first,
        where=before_response[:, first:-1].flatten().nonzero().squeeze(1).to(device),
    )


def response_distribution_and_values(model: nn.Module, rows: ResponseRows, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities [N, vocabulary] that each response token was drawn from, and the values [N] before it.

    `model` is a causal LM with a value head (forward → logits, loss, values).
    """
    kept = torch.arange(rows.first, rows.input_ids.shape[1] - 1, device=rows.input_ids.device)
    logits, _, values = model(rows.input_ids, rows.attention_mask, logits_to_keep=kept, use_cache=False)
    distribution = log_distribution(_packed(logits, rows), temperature)
    return distribution, _packed(values[:, rows.first : -1], rows)


def response_distribution(model: nn.Module, rows: ResponseRows, temperature: float) -> Tensor:
    """Log-probabilities [N, vocabulary] that each response token has under `model`: a causal LM, value head or not."""
    output = model(input_ids=rows.input_ids, attention_mask=rows.attention_mask, use_cache=False)
    logits: Tensor = output[0] if isinstance(output, tuple) else output.logits
    return log_distribution(_packed(logits[:, rows.first : -1].float(), rows), temperature)


def _packed(values: Tensor, rows: ResponseRows) -> Tensor:
    """[batch, L − 1 − first, ...] → [N, ...]."""
    return values.flatten(0, 1).index_select(0, rows.where)


def run_without_dropout(model: nn.Module, *, checkpoint_activations: bool) -> None:
    """Put `model` into the mode of every forward of PPO: dropout off, also when activations are recomputed.

    transformers recomputes only layers in training mode; these get the flag for themselves alone, their dropout
    submodules stay off.

    Raises ValueError for a model that cannot recompute activations without switching dropout on.
    """
    model.eval()
    if not checkpoint_activations:
        return
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"gradient_checkpointing: {type(model).__name__} has no layers that can recompute activations")
    for layer in layers:
        if rates := [name for name, rate in vars(layer).items() if "dropout" in name and rate]:
            raise ValueError(f"gradient_checkpointing: {type(layer).__name__} would apply {rates}; set them to 0 first")
        layer.training = True
