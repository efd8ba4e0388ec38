"""Every Prometheus metric of the reward server, beside those of the gRPC plumbing."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

from reward_server.results import Failed, Outcome, Scored

BATCH_SECONDS = Histogram(
    "rlhf_reward_batch_seconds",
    "Time the reward took for one batch.",
    buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300),
)
BATCH_SAMPLES = Histogram(
    "rlhf_reward_batch_samples", "Samples in one batch.", buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
)
OUTCOMES = Counter(
    "rlhf_reward_outcomes_total", "Samples judged, by outcome and, for failures, code.", ["outcome", "code"]
)
REWARD = Histogram(
    "rlhf_reward_value",
    "Rewards given.",
    buckets=(-100, -10, -3, -1, -0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75, 1, 3, 10, 100),
)
QUEUE_SAMPLES = Gauge("rlhf_reward_queue_samples", "Samples that wait or run.")
RUNNING_BATCHES = Gauge("rlhf_reward_running_batches", "Batches that run.")
SAMPLES_REPEATED = Counter(
    "rlhf_reward_samples_repeated_total", "Samples asked for again: remembered, or running for another call."
)
REMEMBERED_SAMPLES = Gauge("rlhf_reward_remembered_samples", "Final outcomes in memory.")


def observe_outcome(outcome: Outcome) -> None:
    """Count one sample's outcome."""
    OUTCOMES.labels(type(outcome).__name__.lower(), outcome.code.value if isinstance(outcome, Failed) else "").inc()
    if isinstance(outcome, Scored):
        REWARD.observe(outcome.reward)
