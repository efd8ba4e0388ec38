"""A request on its way through the engine, and its completions while they run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from policy_server.engine.detokenize import IncrementalText, StopStrings, TokenDecoder
from policy_server.engine.model import ServedModel
from policy_server.engine.protocol import FinishReason, GenerationRequest, TokenDelta, VersionSpan, WeightsVersion
from policy_server.engine.sampling import SEEDS, Draw
from rlhf.failures import RpcFailure


@dataclass(eq=False)
class Generation:
    """One request and how far it got."""

    request: GenerationRequest
    model: ServedModel
    arrival: int
    deliver: Callable[[TokenDelta | RpcFailure | None], None]  # on the event loop; None = the orderly end
    admitted: int = 0  # completions that have or had a row
    longest: int = field(init=False)  # tokens of prompt and completion that a row of it may come to have
    unfinished: int = field(init=False)
    sampled: bool = False  # some completion has a token
    closed: bool = False  # finished, failed or cancelled: its rows are to be dropped

    def __post_init__(self) -> None:
        request = self.request
        self.longest = min(
            len(request.prompt_token_ids) + request.sampling.max_new_tokens, self.model.max_context_tokens
        )
        self.unfinished = request.sampling.n

    @property
    def waiting(self) -> int:
        """Completions that have no row yet."""
        return 0 if self.closed else self.request.sampling.n - self.admitted


class Row:
    """One completion: its tokens, its text, and what of both was not yet delivered."""

    def __init__(self, generation: Generation, index: int, decoder: TokenDecoder) -> None:
        request = generation.request
        sampling = request.sampling
        self.generation = generation
        self.index = index
        self.model = model = generation.model
        self.finish_reason: FinishReason | None = None
        self.prompt: Sequence[int] = request.prompt_token_ids
        self.completion: list[int] = list(request.completion_prefix)
        self.oldest_cache = WeightsVersion()
        self._limit = generation.longest - len(self.prompt)
        self._seed = (sampling.seed + index) % SEEDS
        self._ending_ids = tuple(sorted({*model.eos_token_ids, *sampling.stop_token_ids}))
        self._text = IncrementalText(decoder)
        self._stops = StopStrings(sampling.stop_strings, before=self._skip_prefix())
        self._delivered = len(self.completion)  # tokens of `completion`
        self._decoded = self._delivered
        self._pending_text = ""
        self._raw: list[float] = []
        self._processed: list[float] = []
        self._spans: list[VersionSpan] = []
        self._seen: Tensor | None = None
        if sampling.repetition_penalty != 1.0:
            self._seen = torch.zeros(model.vocab_size, dtype=torch.bool, device=model.device)
            self._seen[[*self.prompt, *self.completion]] = True
        if len(self.completion) >= self._limit:
            self.finish_reason = FinishReason.LENGTH

    @property
    def fresh(self) -> bool:
        """Whether the model is to be given exactly what other new rows of the request are given."""
        return len(self.completion) == len(self.generation.request.completion_prefix)

    @property
    def live(self) -> bool:
        """Whether it wants another token."""
        return self.finish_reason is None and not self.generation.closed

    @property
    def length(self) -> int:
        """Tokens of prompt and completion."""
        return len(self.prompt) + len(self.completion)

    def draw(self) -> Draw:
        """How its next token is sampled."""
        request = self.generation.request
        return Draw(
            sampling=request.sampling,
            seed=self._seed,
            position=len(self.completion),
            ending_ids=self._ending_ids,
            seen=self._seen,
            raw_logprob=request.raw_logprobs,
            processed_logprob=request.processed_logprobs,
        )

    def accept(self, token_id: int, raw_logprob: float | None, processed_logprob: float | None) -> None:
        """Append a token that the model's live weights sampled, and find out whether it was the last."""
        sampling = self.generation.request.sampling
        self.generation.sampled = True
        self.completion.append(token_id)
        if raw_logprob is not None:
            self._raw.append(raw_logprob)
        if processed_logprob is not None:
            self._processed.append(processed_logprob)
        self._note_weights()
        if self._seen is not None:
            self._seen[token_id] = True
        if sampling.stop_strings:
            self._decode()
            if self._stops.would_find(self._text.unsettled()):
                self._pending_text += self._stops.push(self._text.finish())
        if token_id in self.model.eos_token_ids:
            self.finish_reason = FinishReason.EOS
        elif token_id in sampling.stop_token_ids or self._stops.found:
            self.finish_reason = FinishReason.STOP
        elif len(self.completion) >= self._limit:
            self.finish_reason = FinishReason.LENGTH

    def abort(self) -> None:
        """End it; what it has stays valid."""
        if self.finish_reason is None:
            self.finish_reason = FinishReason.ABORTED

    def take_delta(self) -> TokenDelta | None:
        """What is new, if it finished or has as many new tokens as the request wants in one delta."""
        fresh = len(self.completion) - self._delivered
        if self.finish_reason is None and fresh < max(self.generation.request.stream_interval, 1):
            return None
        self._decode()
        if self.finish_reason is not None:
            self._pending_text += self._stops.push(self._text.finish()) + self._stops.finish()
            if self._stops.found and self.finish_reason is not FinishReason.EOS:
                self.finish_reason = FinishReason.STOP
        delta = TokenDelta(
            index=self.index,
            token_ids=tuple(self.completion[self._delivered :]),
            text=self._pending_text,
            raw_logprobs=tuple(self._raw),
            processed_logprobs=tuple(self._processed),
            spans=tuple(self._spans),
            finish_reason=self.finish_reason,
            stop_string=self._stops.found if self.finish_reason is FinishReason.STOP else "",
        )
        self._delivered = len(self.completion)
        self._pending_text = ""
        self._raw, self._processed, self._spans = [], [], []
        return delta

    def _skip_prefix(self) -> str:
        """Text of completion_prefix: it is context for the text and the stop strings that follow."""
        return self._text.push(self.completion) if self.completion else ""

    def _decode(self) -> None:
        self._pending_text += self._stops.push(self._text.push(self.completion[self._decoded :]))
        self._decoded = len(self.completion)

    def _note_weights(self) -> None:
        oldest = self.oldest_cache if self.oldest_cache != self.model.version else None
        span = VersionSpan(self.model.version, 1, oldest)
        if self._spans and (self._spans[-1].weights, self._spans[-1].oldest_cache) == (span.weights, oldest):
            span = VersionSpan(span.weights, self._spans.pop().token_count + 1, oldest)
        self._spans.append(span)
