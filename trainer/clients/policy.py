"""PolicyClient: generation and log-probabilities from one policy server, for as long as it takes.

A call that fails for a passing reason is made again. Between two attempts `recover` runs (the publisher's `ensure`):
a server that was restarted has lost the weights and, if it is managed, refuses to serve until it gets them.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc

from rlhf.channel import (
    DEFAULT_MAX_MESSAGE_BYTES,
    RetryPolicy,
    call_metadata,
    call_with_retry,
    open_channel,
    wait_until_ready,
)
from rlhf.failures import from_rpc_error
from rlhf.policy.v1 import policy_pb2, policy_pb2_grpc
from trainer.clients.waits import CallWatch, watched
from trainer.versions import WeightsVersion

T = TypeVar("T")

POLICY_SERVICE = "rlhf.policy.v1.PolicyService"
REFERENCE = "reference"
# Reasons that the publisher can mend, or explain: another trainer's weights are live.
OTHER_WEIGHTS = frozenset({"WEIGHTS_BEHIND", "WEIGHTS_AHEAD", "OTHER_RUN"})
_RECOVERIES_PER_ATTEMPT = 3
# The most that a token takes in a LogProbs call, as an id of 5 bytes, and a row beside its tokens.
_TOKEN_BYTES = 5
_ROW_BYTES = 32


class BrokenServerError(RuntimeError):
    """A server answered OK with something that the contract forbids; the message names server and sample."""


class FinishReason(enum.Enum):
    """Why a completion ended; an unknown value of the wire reads as ABORTED."""

    EOS = "eos"
    STOP = "stop"
    LENGTH = "length"
    ABORTED = "aborted"


@dataclass(frozen=True)
class Generation:
    """One completion: every sampled token (EOS included), and `logprobs[t]` of each under what it was drawn from."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: FinishReason
    seed: int
    versions: tuple[WeightsVersion, ...]
    """The weights that sampled the tokens, in their order: several if weights were swapped meanwhile; () = no token."""


@dataclass(frozen=True)
class ModelInfo:
    """What GetModel tells about one model of the server."""

    model: str
    weights: WeightsVersion
    weights_digest: str
    serving_dtype: str
    tokenizer_digest: str
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    max_context_tokens: int
    max_message_bytes: int
    max_log_probs_tokens: int
    processed_logprobs: bool

    def log_probs_groups(self, lengths: Sequence[int], *, rows: int) -> Iterator[range]:
        """Cut sequences of at most `lengths` tokens, in order, into LogProbs calls of at most `rows` within the limits.

        One that is over a limit alone gets a call alone: the server may still take it, or says what is wrong.
        """
        most_tokens = self.max_log_probs_tokens or math.inf
        most_bytes = min(self.max_message_bytes or math.inf, DEFAULT_MAX_MESSAGE_BYTES)
        first = tokens = 0
        for row, length in enumerate(lengths):
            count = row - first
            size = (tokens + length) * _TOKEN_BYTES + (count + 1) * _ROW_BYTES
            if count and (count == rows or tokens + length > most_tokens or size > most_bytes):
                yield range(first, row)
                first, tokens = row, 0
            tokens += length
        if lengths:
            yield range(first, len(lengths))


class PolicyClient:
    """Calls on one policy server; every method raises RpcFailure for what is final and waits out what is not."""

    def __init__(
        self,
        target: str,
        *,
        timeout: float = 300.0,
        retry: RetryPolicy | None = None,
        recover: Callable[[], Awaitable[None]] | None = None,
        watch: CallWatch | None = None,
        metadata: Sequence[tuple[str, str]] = (),
    ) -> None:
        """`timeout` (seconds) bounds each attempt; `recover` runs before an attempt is repeated."""
        self.target = target
        self._timeout = timeout
        self._retry = retry or RetryPolicy()
        self._recover = recover
        self._watch = watch
        self._metadata = tuple(metadata) or call_metadata()
        self._channel = open_channel(target)
        self._stub: Any = policy_pb2_grpc.PolicyServiceStub(self._channel)  # type: ignore[no-untyped-call]

    async def wait_ready(self, within: float | None = None) -> None:
        """Until the server's health says that PolicyService serves (a managed one needs weights first)."""
        with watched(self._watch) as on_wait:
            await wait_until_ready(
                self._channel,
                POLICY_SERVICE,
                what="policy server",
                target=self.target,
                timeout=within,
                on_wait=on_wait,
            )

    async def get_model(self, model: str = "") -> ModelInfo:
        """Describe "" (the policy) or "reference"; answers while the server is not ready."""
        request = policy_pb2.GetModelRequest(model=model)

        async def attempt() -> policy_pb2.GetModelResponse:
            answer: policy_pb2.GetModelResponse = await self._stub.GetModel(
                request, timeout=self._timeout, metadata=self._metadata
            )
            return answer

        with watched(self._watch) as on_wait:
            answer = await call_with_retry(
                attempt, policy=self._retry, what="policy server", target=self.target, on_wait=on_wait
            )
        return ModelInfo(
            model=answer.model,
            weights=WeightsVersion.from_proto(answer.weights),
            weights_digest=answer.weights_digest,
            serving_dtype=answer.serving_dtype,
            tokenizer_digest=answer.tokenizer_digest,
            vocab_size=answer.vocab_size,
            eos_token_ids=tuple(answer.eos_token_ids),
            max_context_tokens=answer.max_context_tokens,
            max_message_bytes=answer.max_message_bytes,
            max_log_probs_tokens=answer.max_log_probs_tokens,
            processed_logprobs=policy_pb2.LOG_PROB_KIND_PROCESSED in answer.logprobs,
        )

    async def generate(
        self,
        prompt_ids: Sequence[int],
        *,
        seed: int,
        max_new_tokens: int,
        temperature: float = 1.0,
        n: int = 1,
        top_k: int = 0,
        top_p: float = 1.0,
        min_new_tokens: int = 0,
        weights: WeightsVersion | None = None,
        or_later: bool = False,
        metadata: Sequence[tuple[str, str]] = (),
    ) -> list[Generation]:
        """Complete one prompt n times, all tokens under exactly `weights` (None = whatever is live).

        or_later: later weights of the same run may sample as well.
        """
        sampling = policy_pb2.SamplingParams(
            temperature=temperature, max_new_tokens=max_new_tokens, seed=seed % 2**64, n=n
        )
        # Set only when they do something, so that a server without a feature is not asked for it.
        if top_k:
            sampling.top_k = top_k
        if top_p != 1.0:
            sampling.top_p = top_p
        if min_new_tokens:
            sampling.min_new_tokens = min_new_tokens
        request = policy_pb2.GenerateRequest(
            prompt=policy_pb2.Prompt(token_ids=policy_pb2.TokenIds(ids=prompt_ids)),
            sampling=sampling,
            logprobs=[policy_pb2.LOG_PROB_KIND_PROCESSED],
            weights=_precondition(weights, or_later=or_later),
            priority=policy_pb2.PRIORITY_BULK,
        )

        async def attempt() -> policy_pb2.GenerateResponse:
            answer: policy_pb2.GenerateResponse = await self._stub.Generate(
                request, timeout=self._timeout, metadata=metadata or self._metadata
            )
            return answer

        answer = await self._call(attempt)
        if [completion.index for completion in answer.completions] != list(range(n)):
            raise BrokenServerError(f"policy server {self.target} did not answer completions 0 to {n - 1} in order")
        return [self._checked(completion, max_new_tokens) for completion in answer.completions]

    async def log_probs(
        self,
        model: str,
        sequences: Sequence[tuple[Sequence[int], Sequence[int]]],
        *,
        temperature: float = 1.0,
        weights: WeightsVersion | None = None,
        metadata: Sequence[tuple[str, str]] = (),
    ) -> list[list[float]]:
        """Natural log-probabilities, under logits / temperature, of each completion of (prompt ids, completion ids)."""
        request = policy_pb2.LogProbsRequest(
            model=model,
            sequences=[
                policy_pb2.Sequence(prompt_token_ids=prompt, completion_token_ids=completion)
                for prompt, completion in sequences
            ],
            temperature=temperature,
            weights=_precondition(weights),
        )

        async def attempt() -> policy_pb2.LogProbsResponse:
            answer: policy_pb2.LogProbsResponse = await self._stub.LogProbs(
                request, timeout=self._timeout, metadata=metadata or self._metadata
            )
            return answer

        answer = await self._call(attempt)
        rows = [list(row.logprobs) for row in answer.sequences]
        if [len(row) for row in rows] != [len(completion) for _, completion in sequences]:
            raise BrokenServerError(f"policy server {self.target} did not answer one log-probability per token")
        if not all(math.isfinite(value) for row in rows for value in row):
            raise BrokenServerError(f"policy server {self.target} answered a log-probability that is not finite")
        return rows

    async def close(self) -> None:
        """Close the channel; calls in flight are cancelled."""
        await self._channel.close()

    async def _call(self, attempt: Callable[[], Awaitable[T]]) -> T:
        attempts = 0

        async def recovering() -> T:
            nonlocal attempts
            attempts += 1
            if attempts > 1 and self._recover is not None:
                await self._recover()
            for recoveries in range(_RECOVERIES_PER_ATTEMPT + 1):
                try:
                    return await attempt()
                except grpc.aio.AioRpcError as error:
                    failure = from_rpc_error(error)
                    lost = failure.reason in OTHER_WEIGHTS and self._recover is not None
                    if not lost or recoveries == _RECOVERIES_PER_ATTEMPT:
                        raise failure from error
                    assert self._recover is not None
                    await self._recover()
            raise AssertionError("unreachable")

        with watched(self._watch) as on_wait:
            return await call_with_retry(
                recovering, policy=self._retry, what="policy server", target=self.target, on_wait=on_wait
            )

    def _checked(self, completion: policy_pb2.Completion, max_new_tokens: int) -> Generation:
        tokens, logprobs = tuple(completion.token_ids), tuple(completion.processed_logprobs)
        if len(logprobs) != len(tokens) or not all(math.isfinite(value) for value in logprobs):
            raise BrokenServerError(f"policy server {self.target} did not answer one finite log-probability per token")
        if len(tokens) > max_new_tokens:
            raise BrokenServerError(f"policy server {self.target} answered more than {max_new_tokens} tokens")
        if tokens and sum(span.token_count for span in completion.spans) != len(tokens):
            raise BrokenServerError(f"policy server {self.target} answered version spans that do not tile the tokens")
        return Generation(
            token_ids=tokens,
            logprobs=logprobs,
            text=completion.text,
            finish_reason=_FINISH_REASONS.get(completion.finish_reason, FinishReason.ABORTED),
            seed=completion.seed,
            versions=tuple(WeightsVersion.from_proto(span.weights) for span in completion.spans),
        )


_FINISH_REASONS = {
    policy_pb2.FINISH_REASON_EOS: FinishReason.EOS,
    policy_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    policy_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
}


def _precondition(weights: WeightsVersion | None, *, or_later: bool = False) -> policy_pb2.WeightsPrecondition | None:
    if weights is None:
        return None
    if or_later:
        return policy_pb2.WeightsPrecondition(min=weights.to_proto())
    return policy_pb2.WeightsPrecondition(exact=weights.to_proto())
