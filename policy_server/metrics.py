"""Every metric of the policy server; the gRPC ones that all servers have are in rlhf/metrics.py."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

from policy_server.engine.observer import Phase
from policy_server.engine.protocol import FinishReason, InFlight, WeightsVersion

_LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)

QUEUED_REQUESTS = Gauge("rlhf_policy_queued_requests", "Requests that wait for their first forward.", ["kind"])
QUEUE_LIMIT_REQUESTS = Gauge("rlhf_policy_queue_limit_requests", "Requests that may wait, of all kinds together.")
RUNNING_COMPLETIONS = Gauge("rlhf_policy_running_completions", "Completions that hold a row of a batch.")
CACHE_BYTES = Gauge("rlhf_policy_cache_bytes", "Memory that the key-value caches of these completions hold.")
CACHE_LIMIT_BYTES = Gauge("rlhf_policy_cache_limit_bytes", "Memory that key-value caches may hold.")
TOKENS = Counter("rlhf_policy_tokens_total", "Tokens through the model, padding left out.", ["phase"])
DECODE_STEP_SECONDS = Histogram(
    "rlhf_policy_decode_step_seconds", "One token for each running completion.", buckets=_STEP_BUCKETS
)
DECODE_STEP_ROWS = Histogram(
    "rlhf_policy_decode_step_rows", "Completions per decode step.", buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
)
FIRST_MESSAGE_SECONDS = Histogram(
    "rlhf_policy_first_message_seconds",
    "From a streaming request's arrival to its first message, with the first token at the default pacing.",
    buckets=_LATENCY_BUCKETS,
)
TOKEN_INTERVAL_SECONDS = Histogram(
    "rlhf_policy_token_interval_seconds",
    "From one message of a streamed completion to its next, for each token in that.",
    buckets=_STEP_BUCKETS,
)
COMPLETIONS = Counter("rlhf_policy_completions_total", "Completions that ended.", ["finish_reason"])
CANCELLED_COMPLETIONS = Counter(
    "rlhf_policy_cancelled_completions_total", "Completions whose caller went away before they ended."
)
SWAP_SECONDS = Histogram(
    "rlhf_policy_weights_swap_seconds",
    "How long generation stood still for new weights.",
    ["in_flight"],
    buckets=_LATENCY_BUCKETS,
)
UPDATES = Counter("rlhf_policy_weights_updates_total", "Weight updates by how they ended.", ["outcome"])
for outcome in ("applied", "failed"):
    UPDATES.labels(outcome)  # shown before the first: nobody sees a counter rise that begins at 1
STAGED_BYTES = Gauge("rlhf_policy_weights_staged_bytes", "Memory held for weight updates.")
WEIGHTS_INFO = Gauge("rlhf_policy_weights_info", "1 for the run whose weights are live; empty = none yet.", ["run_id"])
WEIGHTS_INCARNATION = Gauge("rlhf_policy_weights_incarnation", "Incarnation of the live weights.")
WEIGHTS_VERSION = Gauge("rlhf_policy_weights_version", "Version of the live weights.")


class MetricsObserver:
    """An EngineObserver that feeds the metrics above."""

    def queued(self, *, generations: int, scorings: int) -> None:
        """Requests that wait for their first forward."""
        QUEUED_REQUESTS.labels("generate").set(generations)
        QUEUED_REQUESTS.labels("log_probs").set(scorings)

    def running(self, *, rows: int, cache_bytes: int) -> None:
        """Completions that hold a row of a batch, and the memory of their caches."""
        RUNNING_COMPLETIONS.set(rows)
        CACHE_BYTES.set(cache_bytes)

    def tokens(self, phase: Phase, count: int) -> None:
        """Tokens that went through one forward."""
        TOKENS.labels(phase.value).inc(count)

    def decode_step(self, *, seconds: float, rows: int) -> None:
        """One token for each of `rows` completions."""
        DECODE_STEP_SECONDS.observe(seconds)
        DECODE_STEP_ROWS.observe(rows)

    def finished(self, reason: FinishReason) -> None:
        """One completion ended."""
        COMPLETIONS.labels(reason.value).inc()

    def cancelled(self, *, completions: int) -> None:
        """A request was cancelled with unfinished completions."""
        CANCELLED_COMPLETIONS.inc(completions)

    def swapped(self, in_flight: InFlight, *, seconds: float) -> None:
        """New weights are live."""
        SWAP_SECONDS.labels(in_flight.value).observe(seconds)


def show_live_weights(version: WeightsVersion) -> None:
    """Set the gauges that name the live weights."""
    WEIGHTS_INFO.clear()
    WEIGHTS_INFO.labels(version.run_id).set(1)
    WEIGHTS_INCARNATION.set(version.incarnation)
    WEIGHTS_VERSION.set(version.version)
