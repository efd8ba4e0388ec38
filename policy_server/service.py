"""PolicyService: what the contract promises to callers, over an engine."""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

import grpc

from policy_server import metrics, validation
from policy_server.engine import protocol
from policy_server.prompts import PromptEncoder, read_prompt
from policy_server.readiness import Readiness
from rlhf import tracing
from rlhf.failures import RpcFailure, internal, not_found
from rlhf.policy.v1 import policy_pb2, policy_pb2_grpc
from rlhf.security.caller import current_caller, spending
from rlhf.security.roles import is_training

Context = grpc.aio.ServicerContext[Any, Any]

_FINISH_REASONS = {
    protocol.FinishReason.EOS: policy_pb2.FINISH_REASON_EOS,
    protocol.FinishReason.STOP: policy_pb2.FINISH_REASON_STOP,
    protocol.FinishReason.LENGTH: policy_pb2.FINISH_REASON_LENGTH,
    protocol.FinishReason.ABORTED: policy_pb2.FINISH_REASON_ABORTED,
}
_SEEDS = 1 << 64
_MOST_LOG_PROBS_TOKENS = 1 << 20
WHOLE_COMPLETIONS = 1 << 32  # as a stream interval: more than any max_new_tokens


@dataclass(frozen=True)
class Announcement:
    """What GetModel tells that the engine does not know."""

    tokenizer_digest: str
    max_message_bytes: int
    default_max_new_tokens: int

    @property
    def max_log_probs_tokens(self) -> int:
        """An answer holds two floats for each token at most, and must fit a message with room to spare."""
        return min(self.max_message_bytes // 16, _MOST_LOG_PROBS_TOKENS)


class PolicyService(policy_pb2_grpc.PolicyServiceServicer):
    """Generate, StreamGenerate, LogProbs, GetModel."""

    def __init__(
        self,
        engine: protocol.Engine,
        prompts: PromptEncoder,
        *,
        announcement: Announcement,
        readiness: Readiness,
    ) -> None:
        self._engine = engine
        self._prompts = prompts
        self._announcement = announcement
        self._readiness = readiness
        self._numbers = itertools.count(1)

    async def Generate(  # noqa: N802 - the contract's name
        self, request: policy_pb2.GenerateRequest, context: Context
    ) -> policy_pb2.GenerateResponse:
        """Complete one prompt n times."""
        self._readiness.require()
        wanted = await self._wanted(
            validation.Violations(),
            request,
            default_priority=protocol.Priority.BULK,
            stream_interval=WHOLE_COMPLETIONS,
            path="",
        )
        completions = [
            policy_pb2.Completion(index=index, seed=(wanted.sampling.seed + index) % _SEEDS)
            for index in range(wanted.sampling.n)
        ]
        texts: list[list[str]] = [[] for _ in completions]
        async with aclosing(self._deltas(wanted)) as deltas:
            async for delta in deltas:
                _extend(completions[delta.index], delta)
                texts[delta.index].append(delta.text)
        for completion, pieces in zip(completions, texts, strict=True):
            completion.text = "".join(pieces)
        tracing.annotate(
            prompt_tokens=len(wanted.prompt_token_ids),
            completion_tokens=sum(len(completion.token_ids) for completion in completions),
        )
        return policy_pb2.GenerateResponse(prompt_token_ids=wanted.prompt_token_ids, completions=completions)

    async def StreamGenerate(  # noqa: N802
        self, request: policy_pb2.StreamGenerateRequest, context: Context
    ) -> AsyncGenerator[policy_pb2.StreamGenerateResponse, None]:
        """Complete one prompt n times, as deltas."""
        self._readiness.require()
        violations = validation.Violations()
        wanted = await self._wanted(
            violations,
            validation.require_request(request),
            default_priority=protocol.Priority.INTERACTIVE,
            stream_interval=validation.stream_interval(violations, request),
            path="request.",
        )
        arrived = time.perf_counter()
        prompt_token_ids: tuple[int, ...] = wanted.prompt_token_ids
        last_message: dict[int, float] = {}
        async with aclosing(self._deltas(wanted)) as deltas:
            async for delta in deltas:
                now = time.perf_counter()
                if prompt_token_ids:
                    metrics.FIRST_MESSAGE_SECONDS.observe(now - arrived, tracing.exemplar())
                if delta.index in last_message and delta.token_ids:
                    metrics.TOKEN_INTERVAL_SECONDS.observe((now - last_message[delta.index]) / len(delta.token_ids))
                last_message[delta.index] = now
                completion = policy_pb2.Completion(
                    index=delta.index, text=delta.text, seed=(wanted.sampling.seed + delta.index) % _SEEDS
                )
                _extend(completion, delta)
                yield policy_pb2.StreamGenerateResponse(delta=completion, prompt_token_ids=prompt_token_ids)
                prompt_token_ids = ()

    async def LogProbs(  # noqa: N802
        self, request: policy_pb2.LogProbsRequest, context: Context
    ) -> policy_pb2.LogProbsResponse:
        """Score given tokens."""
        self._readiness.require()
        limits = self._limits(request.model)
        wanted = validation.scoring_request(request, limits, request_id=self._next_id())
        tokens = sum(len(prompt) + len(completion) for prompt, completion in wanted.sequences)
        tracing.annotate(sequences=len(wanted.sequences), tokens=tokens)
        with spending(tokens) as spent:
            scores = await self._engine.log_probs(wanted)
            spent.used = tokens
        entropies: Iterable[list[float]] = scores.entropies if wanted.entropies else itertools.repeat([])
        return policy_pb2.LogProbsResponse(
            sequences=[
                policy_pb2.SequenceLogProbs(logprobs=logprobs, entropies=of_tokens)
                for logprobs, of_tokens in zip(scores.logprobs, entropies, strict=False)
            ],
            weights=wire_version(scores.weights),
        )

    async def GetModel(  # noqa: N802
        self, request: policy_pb2.GetModelRequest, context: Context
    ) -> policy_pb2.GetModelResponse:
        """Describe a model; answers while not serving."""
        known = self._describe(request.model)
        return policy_pb2.GetModelResponse(
            model=known.model,
            weights=wire_version(known.weights),
            weights_digest=known.weights_digest,
            serving_dtype=known.serving_dtype,
            tokenizer_digest=self._announcement.tokenizer_digest,
            vocab_size=known.vocab_size,
            eos_token_ids=known.eos_token_ids,
            max_context_tokens=known.max_context_tokens,
            default_max_new_tokens=self._announcement.default_max_new_tokens,
            max_message_bytes=self._announcement.max_message_bytes,
            logprobs=sorted(validation.LOGPROB_KINDS),
            max_completions=validation.MAX_COMPLETIONS,
            max_log_probs_tokens=self._announcement.max_log_probs_tokens,
            max_running_completions=known.max_running_completions,
            max_cached_tokens=known.max_cached_tokens,
        )

    async def _wanted(
        self,
        violations: validation.Violations,
        request: policy_pb2.GenerateRequest,
        *,
        default_priority: protocol.Priority,
        stream_interval: int,
        path: str,
    ) -> protocol.GenerationRequest:
        """What the engine is asked; the checks come in the order of the contract's table."""
        limits = self._limits(request.model, path)
        source = read_prompt(violations, request.prompt, f"{path}prompt", limits)
        wanted = validation.generation_request(
            violations,
            request,
            limits,
            request_id=self._next_id(),
            default_priority=default_priority,
            stream_interval=stream_interval,
            path=path,
        )
        violations.raise_if_any()
        ids = await self._prompts.encode(source, path=f"{path}prompt", max_tokens=limits.max_context_tokens)
        validation.check_room(ids, wanted.completion_prefix, limits, path=f"{path}prompt")
        caller = current_caller()
        if caller is not None and is_training(caller.roles):  # people who wait go first, whatever a run says of itself
            wanted = replace(wanted, priority=protocol.Priority.BULK)
        return replace(wanted, prompt_token_ids=ids)

    async def _deltas(self, wanted: protocol.GenerationRequest) -> AsyncGenerator[protocol.TokenDelta, None]:
        """The engine's deltas of every completion to its end; closing this early frees the engine's rows."""
        unfinished = set(range(wanted.sampling.n))
        context_tokens = self._describe(wanted.model).max_context_tokens
        most = wanted.sampling.n * min(wanted.sampling.max_new_tokens, context_tokens)
        with spending(most) as spent:
            async with aclosing(self._engine.submit(wanted)) as deltas:
                async for delta in deltas:
                    spent.used += len(delta.token_ids)
                    if delta.finish_reason is not None:
                        unfinished.discard(delta.index)
                    yield delta
        if unfinished:
            raise internal(f"the engine left {len(unfinished)} of {wanted.sampling.n} completions unfinished")

    def _limits(self, model: str, path: str = "") -> validation.Limits:
        known = self._describe(model, path)
        return validation.Limits(
            vocab_size=known.vocab_size,
            max_context_tokens=known.max_context_tokens,
            default_max_new_tokens=self._announcement.default_max_new_tokens,
            max_log_probs_tokens=self._announcement.max_log_probs_tokens,
        )

    def _describe(self, model: str, path: str = "") -> protocol.ModelDescription:
        try:
            return self._engine.describe(validation.model_name(model))
        except RpcFailure as failure:
            if failure.code is not grpc.StatusCode.NOT_FOUND:
                raise
            raise not_found(f"{path}model", f"model {model[:64]!r}") from failure

    def _next_id(self) -> str:
        # Not the caller's x-request-id, which a retry or a second caller may send again while the first still runs.
        return f"request-{next(self._numbers)}"


def wire_version(version: protocol.WeightsVersion) -> policy_pb2.WeightsVersion:
    """The contract's form of a version."""
    return policy_pb2.WeightsVersion(run_id=version.run_id, incarnation=version.incarnation, version=version.version)


def _extend(completion: policy_pb2.Completion, delta: protocol.TokenDelta) -> None:
    """Add everything of a delta but its text."""
    completion.token_ids.extend(delta.token_ids)
    completion.raw_logprobs.extend(delta.raw_logprobs)
    completion.processed_logprobs.extend(delta.processed_logprobs)
    for span in delta.spans:
        _add_span(completion, span)
    if delta.finish_reason is not None:
        completion.finish_reason = _FINISH_REASONS[delta.finish_reason]
        completion.stop_string = delta.stop_string


def _add_span(completion: policy_pb2.Completion, span: protocol.VersionSpan) -> None:
    if span.token_count == 0:
        return
    added = policy_pb2.VersionSpan(weights=wire_version(span.weights), token_count=span.token_count)
    if span.oldest_cache is not None:
        added.oldest_cache.CopyFrom(wire_version(span.oldest_cache))
    last = completion.spans[-1] if completion.spans else None
    if (
        last is not None
        and last.weights == added.weights
        and last.HasField("oldest_cache") == added.HasField("oldest_cache")
        and last.oldest_cache == added.oldest_cache
    ):
        last.token_count += added.token_count
    else:
        completion.spans.append(added)
