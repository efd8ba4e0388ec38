"""What transformers' own processors make of logits under the contract's settings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from policy_server.engine.protocol import Sampling


def processed_by_transformers(
    logits: Tensor, sampling: Sampling, *, history: Sequence[int], prompt: int, ending: Sequence[int]
) -> Tensor:
    """Of logits [vocab] of the token after `history`, whose first `prompt` tokens are the prompt; dtype as given."""
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(penalty=sampling.repetition_penalty))
    processors.append(MinNewTokensLengthLogitsProcessor(prompt, sampling.min_new_tokens, list(ending)))
    processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        processors.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0.0:
        processors.append(MinPLogitsWarper(sampling.min_p))
    processed: Tensor = processors(torch.tensor([history]), logits.unsqueeze(0))
    return processed[0]
