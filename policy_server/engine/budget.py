"""How much runs at once, and what callers are told when memory does not hold it."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch

from rlhf import failures
from rlhf.failures import RpcFailure

_RETRY_SECONDS = 1.0

_log = logging.getLogger(__name__)


@dataclass
class Budget:
    """Completions over all batches, and padded tokens of one prefill or scoring forward; never below one sequence.

    Each time memory runs out it is halved for good: those who were told to come back would else run it out again.
    fixed: it stays as it is, since what shares a batch must not change (reproducible). cache_bytes: of the caches of
    all completions, without bound where the runner sees to it.
    """

    rows: int
    tokens: int
    fixed: bool
    cache_bytes: float = math.inf

    def failure(self, error: Exception, *, completions: int, scored: int = 0, scored_tokens: int = 0) -> RpcFailure:
        """What those are told whose forward ended in `error`; when it was for want of memory, less runs from now on.

        completions: all that hold a row, those of the forward included; scored, scored_tokens: sequences and padded
        tokens of a scoring forward.
        """
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            return translated(error)
        if self.fixed or scored + completions <= 1:
            return failures.internal("out of memory in a forward that may not be made smaller")
        if scored > 1:
            self.tokens = min(self.tokens, scored_tokens // 2)
        else:
            self.rows = min(self.rows, max(completions // 2, 1))
        _log.warning("Out of memory: from now on %d rows and forwards of %d tokens at most", self.rows, self.tokens)
        return translated(error)


def translated(error: Exception) -> RpcFailure:
    """What a caller is told of an error in the engine."""
    if isinstance(error, RpcFailure):
        return error
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return failures.overloaded("out of memory in the engine", _RETRY_SECONDS)
    return failures.internal(f"{type(error).__name__} in the engine")
