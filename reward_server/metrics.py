"""Every Prometheus metric of the reward server, beside those of the gRPC plumbing.

kind: what judges ("function", "model", …). component: its name within a composite, empty for the served reward itself.
"""

from __future__ import annotations

from collections.abc import Sequence

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
QUEUE_LIMIT_SAMPLES = Gauge("rlhf_reward_queue_limit_samples", "Samples that may wait or run.", _LABELS)
RUNNING_BATCHES = Gauge("rlhf_reward_running_batches", "Batches that run.", _LABELS)
SAMPLES_REPEATED = Counter(
    "rlhf_reward_samples_repeated_total", "Samples asked for again: remembered, or running for another call.", _LABELS
)
REMEMBERED_SAMPLES = Gauge("rlhf_reward_remembered_samples", "Final outcomes in memory.", _LABELS)


class RewardMetrics:
    """The metrics of one reward, their labels looked up once: that costs microseconds."""

    def __init__(self, kind: str, component: str, *, max_queue_samples: int) -> None:
        self._labels = (kind, component)
        self.batch_seconds = BATCH_SECONDS.labels(*self._labels)
        self.batch_samples = BATCH_SAMPLES.labels(*self._labels)
        self.queue_samples = QUEUE_SAMPLES.labels(*self._labels)
        QUEUE_LIMIT_SAMPLES.labels(*self._labels).set(max_queue_samples)
        self.running_batches = RUNNING_BATCHES.labels(*self._labels)
        self.repeated = SAMPLES_REPEATED.labels(*self._labels)
        self.remembered_samples = REMEMBERED_SAMPLES.labels(*self._labels)
        self._reward = REWARD.labels(*self._labels)
        self._scored = OUTCOMES.labels(*self._labels, "scored", "")

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        """Count a batch's outcomes."""
        scored = [outcome.reward for outcome in outcomes if isinstance(outcome, Scored)]
        self._scored.inc(len(scored))
        for reward in scored:
            self._reward.observe(reward)
        for outcome in outcomes:
            if not isinstance(outcome, Scored):
                code = outcome.code if isinstance(outcome, Failed) else ""
                OUTCOMES.labels(*self._labels, type(outcome).__name__.lower(), code).inc()


CIRCUIT_STATE = Gauge(
    "rlhf_reward_circuit_state",
    "Whether the server that a reward asks is called: 0 = yes, 1 = one call probes it, 2 = no, it kept failing.",
    ("kind", "target"),
)
JUDGE_TOKENS = Counter(
    "rlhf_reward_judge_tokens_total", "Tokens that the judge read (direction in) and wrote (out).", ("direction",)
)
HUMAN_TICKETS = Gauge(
    "rlhf_reward_human_tickets", "Open tickets of the human kind, by whether somebody has one just now.", ("state",)
)
HUMAN_OLDEST_SECONDS = Gauge(
    "rlhf_reward_human_oldest_ticket_seconds", "Age of the oldest open ticket of the human kind; 0 = there is none."
)
HUMAN_RATINGS = Counter("rlhf_reward_human_ratings_total", "Ratings that were stored, those undone later included.")
HUMAN_SKIPS = Counter("rlhf_reward_human_skips_total", "Skips that were stored, those undone later included.")
HUMAN_LEASES_EXPIRED = Counter(
    "rlhf_reward_human_leases_expired_total", "Leases that ran out and whose ticket went to somebody else."
)
