"""What the service asks of an engine, and nothing about how an engine does it.

An engine owns the models and one thread that runs them. The service owns validation, text and the wire: by the
time a request arrives here its token ids are in range and its settings are legal, so an engine only raises for
what it alone can know (its queue is full, its weights moved).
"""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, order=True)
class WeightsVersion:
    """One set of weights, ordered by (incarnation, version) within a run; run_id "" = loaded at start, unpublished."""

    run_id: str = ""
    incarnation: int = 0
    version: int = 0

    def is_after(self, other: WeightsVersion) -> bool:
        """True when both belong to one run and this one is newer."""
        return self.run_id == other.run_id and (self.incarnation, self.version) > (other.incarnation, other.version)


@dataclass(frozen=True)
class WeightsPrecondition:
    """Holds for every token of an answer. At most one of the two is set; none = any weights."""

    exact: WeightsVersion | None = None
    minimum: WeightsVersion | None = None


@dataclass(frozen=True)
class VersionSpan:
    """`token_count` tokens sampled by `weights`; `oldest_cache` = oldest weights of a KV entry they attended to."""

    weights: WeightsVersion
    token_count: int
    oldest_cache: WeightsVersion | None = None


class FinishReason(enum.Enum):
    """Why a completion ended; the names are the contract's."""

    EOS = "eos"
    STOP = "stop"
    LENGTH = "length"
    ABORTED = "aborted"


class InFlight(enum.Enum):
    """What becomes of completions that run when weights are swapped; the names are the contract's."""

    RECOMPUTE = "recompute"
    KEEP_CACHE = "keep_cache"
    WAIT = "wait"
    ABORT = "abort"


class Priority(enum.IntEnum):
    """Order of waiting requests; lower goes first, first come first served within one."""

    INTERACTIVE = 1
    BULK = 2


@dataclass(frozen=True)
class Sampling:
    """Every setting resolved (nothing unset), in the order in which they apply; temperature 0 = greedy."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 16
    min_new_tokens: int = 0
    stop_strings: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    seed: int = 0
    n: int = 1


@dataclass(frozen=True)
class GenerationRequest:
    """n completions of one prompt. `completion_prefix` counts for limits, penalties and random positions."""

    request_id: str
    model: str
    prompt_token_ids: tuple[int, ...]
    sampling: Sampling
    completion_prefix: tuple[int, ...] = ()
    raw_logprobs: bool = False
    processed_logprobs: bool = False
    weights: WeightsPrecondition = field(default_factory=WeightsPrecondition)
    priority: Priority = Priority.BULK
    stream_interval: int = 1  # least new tokens per delta of a completion; max_new_tokens or more = one delta each


@dataclass(frozen=True)
class TokenDelta:
    """New tokens of one completion. The logprob tuples are as long as token_ids when asked for, else empty.

    `text` is new text, correct incremental UTF-8, never part of a stop string; the deltas of a completion add up to
    its text. `finish_reason` is set in the last delta of a completion, which may hold no tokens.
    """

    index: int
    token_ids: tuple[int, ...]
    text: str = ""
    raw_logprobs: tuple[float, ...] = ()
    processed_logprobs: tuple[float, ...] = ()
    spans: tuple[VersionSpan, ...] = ()
    finish_reason: FinishReason | None = None
    stop_string: str = ""


@dataclass(frozen=True)
class ScoringRequest:
    """Log-probabilities of given completions under logits / temperature, all under one weights version."""

    request_id: str
    model: str
    sequences: Sequence[tuple[Sequence[int], Sequence[int]]]  # (prompt ids, completion ids)
    temperature: float = 1.0
    entropies: bool = False
    weights: WeightsPrecondition = field(default_factory=WeightsPrecondition)


@dataclass(frozen=True)
class Scores:
    """One list per sequence, one natural log-probability (and entropy, in nats) per completion token."""

    logprobs: list[list[float]]
    entropies: list[list[float]]
    weights: WeightsVersion


@dataclass(frozen=True)
class ModelDescription:
    """What GetModel tells, as far as the engine knows it."""

    model: str
    weights: WeightsVersion
    weights_digest: str
    serving_dtype: str
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    max_context_tokens: int
    max_running_completions: int
    max_cached_tokens: int  # of all that runs of this model, while nothing of another does


@dataclass(frozen=True)
class ParameterSpec:
    """A parameter of the served policy, named as in its state dict; `tied_to` = the name it shares memory with."""

    name: str
    shape: tuple[int, ...]
    tied_to: str | None = None


class TokenStream(Protocol):
    """An async iterator of one request's deltas, interleaved over its completions.

    Iterating raises RpcFailure when the request fails.
    """

    def __aiter__(self) -> AsyncIterator[TokenDelta]: ...

    async def __anext__(self) -> TokenDelta: ...

    async def aclose(self) -> None:
        """Cancel the request if it has not finished; safe to call at any time (`contextlib.aclosing` does)."""
        ...


class Engine(Protocol):
    """Generates, scores and swaps weights; every method is called from the event loop and never blocks it.

    Errors are `rlhf.failures.RpcFailure`: overloaded (queue full), weights_behind / weights_ahead / other_run
    (a precondition that is not met), not_found (unknown model), unavailable (shutting down).
    """

    def submit(self, request: GenerationRequest) -> TokenStream:
        """Queue a request at once; the stream yields deltas of all n completions, interleaved, until each has finished.

        A full queue, an unknown model and a stopped engine are raised here, everything else while iterating. Closing
        or dropping the stream early (or cancelling its consumer) cancels the request within one decode step.
        """
        ...

    def cancel(self, request_id: str) -> None:
        """Free the rows of a request within one decode step; unknown ids are ignored."""
        ...

    async def log_probs(self, request: ScoringRequest) -> Scores:
        """Score given tokens, in micro-batches under a token budget."""
        ...

    async def load_weights(
        self,
        tensors: Mapping[str, Tensor],
        version: WeightsVersion,
        *,
        if_current: WeightsVersion | None,
        in_flight: InFlight,
    ) -> WeightsVersion:
        """Swap staged tensors in between two decode steps and return what is live then.

        `tensors` are whole and verified (names and shapes as `parameters()` lists them; any dtype, cast here); those
        left out keep their values. Raises aborted when `version` is not above the live one of its run, and
        failed_precondition when `if_current` does not hold; the live weights are untouched in both cases.
        """
        ...

    def parameters(self) -> Sequence[ParameterSpec]:
        """Every parameter of the policy, tied ones included."""
        ...

    def describe(self, model: str) -> ModelDescription:
        """Describe "policy" or "reference"; raises not_found for another name."""
        ...

    async def start(self) -> None:
        """Start the engine's thread."""
        ...

    async def stop(self, *, finish_within: float) -> None:
        """Let what runs finish for at most `finish_within` seconds, then end everything as unavailable."""
        ...
