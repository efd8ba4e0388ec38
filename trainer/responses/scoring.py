"""Forward passes that return what a model says of response tokens alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainer.adapters import without_adapter
from trainer.ppo.logprobs import entropy, log_distribution, token_logprobs
from trainer.responses.head import head_logprobs
from trainer.responses.rows import ResponseRows


def packed_scores(model: PreTrainedModel, rows: ResponseRows, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities and entropies [N] of the response tokens, and the last hidden states before them [N, hidden].

    `model` has been through `enable_packing`, and `rows` are packed.
    """
    # A mask of four dimensions is taken as it is: transformers would make one of tokens × tokens, and attention within
    # packed rows reads none.
    no_mask = torch.empty((1, 1, 1, 1), device=rows.input_ids.device)
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    body = model.base_model(
        inputs_embeds=_embed(model.get_input_embeddings(), rows.input_ids, tied_to=head.weight),
        attention_mask=no_mask,
        position_ids=rows.position_ids,
        use_cache=False,
        packed_rows=rows.packed,
    )
    hidden = body.last_hidden_state.flatten(0, 1).index_select(0, rows.where)
    logprobs, entropies = head_logprobs(hidden, head.weight, head.bias, rows.tokens, temperature)
    return logprobs, entropies, hidden


def _embed(embedding: Any, ids: Tensor, *, tied_to: Tensor) -> Tensor:
    """[1, tokens] → [1, tokens, hidden].

    Where the head has the same weight, the gradient has the head's part in every row: that of the few tokens read is
    added to it in place, rather than made as large and summed into a third of that size.
    """
    tied = embedding.weight is tied_to
    return F.embedding(ids, embedding.weight, padding_idx=embedding.padding_idx, sparse=tied)


class PackedReference(nn.Module):
    """A frozen language model that reads packed rows; calling it is what autocast wraps."""

    def __init__(self, language_model: PreTrainedModel) -> None:
        super().__init__()
        self.language_model = language_model

    def forward(self, rows: ResponseRows, temperature: float) -> Tensor:
        """Log-probabilities [N] of the response tokens."""
        return packed_scores(self.language_model, rows, temperature)[0]


class PolicyWithoutAdapter(nn.Module):
    """The policy as it was before it had an adapter, whatever it is wrapped in; it has no parameters of its own."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self._policy = (policy,)  # in a tuple it is no submodule, which would be frozen with this one

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the policy gives, value head included. Not for training."""
        [policy] = self._policy
        with without_adapter(policy):
            return policy(*args, **kwargs)


class PackedPolicyWithoutAdapter(PackedReference):
    """The same for packed rows."""

    def __init__(self, policy: nn.Module) -> None:
        nn.Module.__init__(self)
        self._base = PolicyWithoutAdapter(policy)

    def forward(self, rows: ResponseRows, temperature: float) -> Tensor:
        """Log-probabilities [N] of the response tokens."""
        logprobs: Tensor = self._base(responses=rows, temperature=temperature)[0]
        return logprobs


def scores_and_values(model: nn.Module, rows: ResponseRows, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the response tokens, entropies (without gradient) and values before them, each [N].

    `model` is a causal LM with a value head; for packed rows, one that has been through `enable_packing`.
    """
    if rows.packed is not None:
        logprobs, entropies, values = model(responses=rows, temperature=temperature)
        return logprobs, entropies, values
    distribution, values = distribution_and_values(model, rows, temperature)
    return token_logprobs(distribution, rows.tokens), entropy(distribution.detach()), values


def logprobs_under(reference: nn.Module, rows: ResponseRows, temperature: float) -> Tensor:
    """Log-probabilities [N] of the response tokens. `rows` are packed for a `PackedReference`, padded for others."""
    if isinstance(reference, PackedReference):
        logprobs: Tensor = reference(rows, temperature)
        return logprobs
    return token_logprobs(response_distribution(reference, rows, temperature), rows.tokens)


def distribution_and_values(model: nn.Module, rows: ResponseRows, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities [N, vocabulary] that each response token was drawn from, and the values [N] before it.

    `model` is any causal LM with a value head (forward → logits, loss, values); `rows` are padded.
    """
    columns = rows.input_ids.shape[1]
    kept = torch.arange(rows.first, columns, device=rows.input_ids.device)
    logits, _, values = model(rows.input_ids, rows.attention_mask, logits_to_keep=kept, use_cache=False)
    row, column = rows.where // columns, rows.where % columns
    return log_distribution(logits[row, column - rows.first], temperature), values[row, column]


def response_distribution(model: nn.Module, rows: ResponseRows, temperature: float) -> Tensor:
    """Log-probabilities [N, vocabulary] that each response token has under `model`: a causal LM, value head or not.

    `rows` are padded.
    """
    output = model(input_ids=rows.input_ids, attention_mask=rows.attention_mask, use_cache=False)
    logits: Tensor = output[0] if isinstance(output, tuple) else output.logits
    return log_distribution(logits.flatten(0, 1).index_select(0, rows.where).float(), temperature)
