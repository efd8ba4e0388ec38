"""Log-probabilities and entropies from logits."""

from __future__ import annotations

import torch
from torch import Tensor


def log_distribution(logits: Tensor, temperature: float) -> Tensor:
    """Log-probabilities of every token at `temperature`; logits and result are [..., vocabulary]."""
    return torch.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)


def token_logprobs(distribution: Tensor, tokens: Tensor) -> Tensor:
    """The log-probability of each token; distribution [..., vocabulary], tokens and result [...]."""
    return distribution.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def entropy(distribution: Tensor) -> Tensor:
    """Entropy in nats at each position; distribution [..., vocabulary] log-probabilities, result [...]."""
    terms: Tensor = torch.special.entr(distribution.exp())
    return terms.sum(-1)
