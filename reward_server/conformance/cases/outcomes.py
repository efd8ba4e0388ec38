"""Every outcome of every answer in the run is well formed."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from reward_server.conformance.case import Level, watch
from reward_server.conformance.compare import kind
from reward_server.conformance.exchange import Exchange
from rlhf.reward.v1 import reward_pb2

_MAX_TEXT_BYTES = 1024
_MAX_CODE_BYTES = 64
_NO_SCORED = "no sample was scored"
_NO_TOKEN_REWARDS = "no sample got token rewards"


@watch("outcomes/set", Level.MUST, "Unset is a broken server, and never a score.", absent="no batch was answered")
def outcome_set(exchange: Exchange) -> Iterator[str | None]:
    """Every result has an outcome."""
    for sample, result in exchange.judgements():
        yield f"the outcome of {sample.sample_id} is unset" if kind(result) == "unset" else None


@watch("outcomes/reward-present", Level.MUST, "Required, finite; higher is better.", absent=_NO_SCORED)
def reward_present(exchange: Exchange) -> Iterator[str | None]:
    """Every scored sample has a reward, be it 0."""
    for sample, scored in _scored(exchange):
        yield None if scored.HasField("reward") else f"{sample.sample_id} is scored, and its reward is unset"


@watch(
    "outcomes/reward-finite",
    Level.MUST,
    "A client MUST refuse a response in which it is unset, NaN or infinite.",
    absent=_NO_SCORED,
)
def reward_finite(exchange: Exchange) -> Iterator[str | None]:
    """Every reward is a finite number."""
    for sample, scored in _scored(exchange):
        yield None if math.isfinite(scored.reward) else f"the reward of {sample.sample_id} is {scored.reward}"


@watch(
    "outcomes/components-finite",
    Level.MUST,
    "Named numbers for reports, finite.",
    absent="no sample got components",
)
def components_finite(exchange: Exchange) -> Iterator[str | None]:
    """Every component is a finite number."""
    for sample, scored in _scored(exchange):
        for name, value in scored.components.items():
            yield None if math.isfinite(value) else f"the component {name!r} of {sample.sample_id} is {value}"


@watch(
    "outcomes/token-rewards-length",
    Level.MUST,
    "Empty, or one finite number for each of completion_token_ids, 0 outside sampled_ranges.",
    absent=_NO_TOKEN_REWARDS,
)
def token_rewards_length(exchange: Exchange) -> Iterator[str | None]:
    """Token rewards are as many as the completion's token ids."""
    for sample, rewards in _token_rewards(exchange):
        count, tokens = len(rewards), len(sample.completion_token_ids)
        yield None if count == tokens else f"{sample.sample_id} has {tokens} token ids and got {count} token rewards"


@watch(
    "outcomes/token-rewards-finite",
    Level.MUST,
    "Empty, or one finite number for each of completion_token_ids, 0 outside sampled_ranges.",
    absent=_NO_TOKEN_REWARDS,
)
def token_rewards_finite(exchange: Exchange) -> Iterator[str | None]:
    """Token rewards are finite numbers."""
    for sample, rewards in _token_rewards(exchange):
        wrong = [index for index, reward in enumerate(rewards) if not math.isfinite(reward)]
        yield f"token reward {wrong[0]} of {sample.sample_id} is {rewards[wrong[0]]}" if wrong else None


@watch(
    "outcomes/token-rewards-sampled",
    Level.MUST,
    "Empty, or one finite number for each of completion_token_ids, 0 outside sampled_ranges.",
    absent="no sample with sampled_ranges got token rewards",
)
def token_rewards_sampled(exchange: Exchange) -> Iterator[str | None]:
    """Token rewards are 0 for tokens that the policy did not sample."""
    for sample, rewards in _token_rewards(exchange):
        if not sample.sampled_ranges:
            continue
        sampled = {index for each in sample.sampled_ranges for index in range(each.first, each.past_last)}
        wrong = [index for index, reward in enumerate(rewards) if reward != 0 and index not in sampled]
        yield (
            f"token {wrong[0]} of {sample.sample_id} lies outside its sampled_ranges and got {rewards[wrong[0]]:g}"
            if wrong
            else None
        )


@watch(
    "outcomes/abstained-reason",
    Level.MUST,
    "For people, at most 1 KiB of UTF-8. MAY be empty.",
    absent="no sample was abstained from",
)
def abstained_reason(exchange: Exchange) -> Iterator[str | None]:
    """The reason of an abstention is at most 1 KiB long."""
    for sample, result in exchange.judgements():
        if result.HasField("abstained"):
            yield _too_long(sample, "reason", result.abstained.reason)


@watch(
    "outcomes/failed-code",
    Level.MUST,
    "UPPER_SNAKE_CASE, at most 64 bytes, the same for the same cause for ever: it becomes a label of metrics.",
    absent="no sample failed",
)
def failed_code(exchange: Exchange) -> Iterator[str | None]:
    """The code of a failure is UPPER_SNAKE_CASE and at most 64 bytes long."""
    for sample, result in exchange.judgements():
        if result.HasField("failed"):
            code = result.failed.code
            right = re.fullmatch(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)*", code) and len(code) <= _MAX_CODE_BYTES
            yield None if right else f"{sample.sample_id} failed with the code {code[:80]!r}"


@watch(
    "outcomes/failed-message",
    Level.MUST,
    "For people, at most 1 KiB of UTF-8. SHOULD name the cause in the sample.",
    absent="no sample failed",
)
def failed_message(exchange: Exchange) -> Iterator[str | None]:
    """The message of a failure is at most 1 KiB long."""
    for sample, result in exchange.judgements():
        if result.HasField("failed"):
            yield _too_long(sample, "message", result.failed.message)


@watch("pending/retry-after", Level.MUST, "Required, above 0.", absent="no sample was PENDING")
def retry_after(exchange: Exchange) -> Iterator[str | None]:
    """Every PENDING sample says when to come back."""
    for sample, result in exchange.judgements():
        if result.HasField("pending"):
            wait = result.pending.retry_after
            positive = wait.seconds >= 0 and wait.nanos >= 0 and wait.seconds + wait.nanos > 0
            yield None if positive else f"{sample.sample_id} is PENDING, and its retry_after is not above 0"


def _scored(exchange: Exchange) -> Iterator[tuple[reward_pb2.Sample, reward_pb2.Scored]]:
    for sample, result in exchange.judgements():
        if result.HasField("scored"):
            yield sample, result.scored


def _token_rewards(exchange: Exchange) -> Iterator[tuple[reward_pb2.Sample, list[float]]]:
    for sample, scored in _scored(exchange):
        if scored.token_rewards:
            yield sample, list(scored.token_rewards)


def _too_long(sample: reward_pb2.Sample, what: str, text: str) -> str | None:
    size = len(text.encode())
    return f"the {what} of {sample.sample_id} is {size} bytes long" if size > _MAX_TEXT_BYTES else None
