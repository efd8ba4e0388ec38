"""Every Prometheus metric of the reward server, beside those of the gRPC plumbing.

kind: what judges ("function", "model", …). component: its name within a composite, empty for the served reward itself.
"""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

from reward_server.results import Failed, Outcome, Scored

_LABELS = ("kind", "component")

BATCH_SECONDS = Histogram(
    "rlhf_reward_batch_seconds",
    "Time the reward took for one batch.",
    _LABELS,
    buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300),
)
BATCH_SAMPLES = Histogram(
    "rlhf_reward_batch_samples", "Samples in one batch.", _LABELS, buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
)
OUTCOMES = Counter(
    "rlhf_reward_outcomes_total",
    "Samples judged, by outcome and, for failures, code.",
    (*_LABELS, "outcome", "code"),
)
REWARD = Histogram(
    "rlhf_reward_value",
    "Rewards given.",
    _LABELS,
    buckets=(-100, -10, -3, -1, -0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75, 1, 3, 10, 100),
)
QUEUE_SAMPLES = Gauge("rlhf_reward_queue_samples", "Samples that wait or run.", _LABELS)
RUNNING_BATCHES = Gauge("rlhf_reward_running_batches", "Batches that run.", _LABELS)
SAMPLES_REPEATED = Counter(
    "rlhf_reward_samples_repeated_total", "Samples asked for again: remembered, or running for another call.", _LABELS
)
REMEMBERED_SAMPLES = Gauge("rlhf_reward_remembered_samples", "Final outcomes in memory.", _LABELS)


class RewardMetrics:
    """The metrics of one reward, labelled once: looking labels up costs microseconds, each sample has its share."""

    def __init__(self, kind: str, component: str) -> None:
        self._labels = (kind, component)
        self.batch_seconds = BATCH_SECONDS.labels(*self._labels)
        self.batch_samples = BATCH_SAMPLES.labels(*self._labels)
        self.queue_samples = QUEUE_SAMPLES.labels(*self._labels)
        self.running_batches = RUNNING_BATCHES.labels(*self._labels)
        self.repeated = SAMPLES_REPEATED.labels(*self._labels)
        self.remembered_samples = REMEMBERED_SAMPLES.labels(*self._labels)
        self._reward = REWARD.labels(*self._labels)
        self._scored = OUTCOMES.labels(*self._labels, "scored", "")

    def observe(self, outcome: Outcome) -> None:
        """Count one sample's outcome."""
        if isinstance(outcome, Scored):
            self._scored.inc()
            self._reward.observe(outcome.reward)
            return
        code = outcome.code if isinstance(outcome, Failed) else ""
        OUTCOMES.labels(*self._labels, type(outcome).__name__.lower(), code).inc()
