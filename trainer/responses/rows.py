"""Prompt + response rows as a model reads them: one after the other, or padded on the right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class PackedRows:
    """Where the tokens of rows that follow each other without padding belong. L = longest row."""

    count: int
    longest: int
    slots: Tensor
    """int64 [tokens]: the place of each token in a flattened [count, L]."""
    asked: Tensor
    """int64 [N]: the tokens whose last hidden state somebody asks for."""


@dataclass(frozen=True)
class ResponseRows:
    """Samples as model input, and where their response tokens lie. T = longest response, N = response tokens.

    The last token of a row is no input: nothing that is asked for depends on it.
    """

    input_ids: Tensor
    """int64 [1, tokens] if packed, otherwise [batch, L]."""
    packed: PackedRows | None
    position_ids: Tensor | None
    """int64 [1, tokens] if packed."""
    attention_mask: Tensor | None
    """int64 [batch, L], 1 on tokens, unless packed."""
    mask: Tensor
    """bool [batch, T], True on response tokens."""
    tokens: Tensor
    """int64 [N]: the response tokens of all rows, row by row."""
    where: Tensor
    """int64 [N]: index of the position *before* each response token in the flattened `input_ids`."""
    first: int
    """The first column of a padded row whose logits any row needs; 0 if packed."""

    def padded(self, values: Tensor) -> Tensor:
        """[N] → [batch, T], 0 on padding."""
        return values.new_zeros(self.mask.shape).masked_scatter(self.mask, values)

    def unpacked(self, values: Tensor) -> Sequence[Tensor]:
        """[N] → one [t_i] per row."""
        return torch.split(values, self.mask.sum(1).tolist())


def collate(
    queries: Sequence[Tensor], responses: Sequence[Tensor], *, packed: bool, pad_id: int, device: torch.device
) -> ResponseRows:
    """Rows of query + response on `device`, each of at least one token; `pad_id` fills padding."""
    query_lengths = torch.tensor([len(query) for query in queries])
    response_lengths = torch.tensor([len(response) for response in responses])
    lengths = query_lengths + response_lengths - 1
    count, longest = len(queries), int(lengths.max())
    columns = torch.arange(longest)
    is_token = columns < lengths[:, None]
    before_response = is_token & (columns >= query_lengths[:, None] - 1)
    ids = [torch.cat([query, response[:-1]]) for query, response in zip(queries, responses, strict=True)]
    common = {
        "mask": (torch.arange(int(response_lengths.max())) < response_lengths[:, None]).to(device),
        "tokens": torch.cat(list(responses)).to(device),
    }
    if packed:
        where = before_response[is_token].nonzero().squeeze(1).to(device)
        return ResponseRows(
            input_ids=torch.cat(ids)[None].to(device),
            packed=PackedRows(count, longest, is_token.flatten().nonzero().squeeze(1).to(device), where),
            position_ids=columns.expand_as(is_token)[is_token][None].to(device),
            attention_mask=None,
            where=where,
            first=0,
            **common,
        )
    return ResponseRows(
        input_ids=nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad_id).to(device),
        packed=None,
        position_ids=None,
        attention_mask=is_token.long().to(device),
        where=before_response.flatten().nonzero().squeeze(1).to(device),
        first=int(query_lengths.min()) - 1,
        **common,
    )
