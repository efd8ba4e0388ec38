"""Every Prometheus metric of the trainer."""

from __future__ import annotations

import re
from collections.abc import Mapping

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000)


class TrainerMetrics:
    """Gauges follow the last completed step; one instance per registry."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._registry = registry
        self._statistics: dict[str, Gauge] = {}
        self.step = Gauge("rlhf_trainer_step", "Completed PPO steps of the run.", registry=registry)
        self.steps_planned = Gauge(
            "rlhf_trainer_steps_planned", "PPO steps after which the run ends.", registry=registry
        )
        self.steps_completed = Counter(
            "rlhf_trainer_steps_completed", "PPO steps completed by this process.", registry=registry
        )
        self.weights_version = Gauge(
            "rlhf_trainer_weights_version", "Version of the published weights.", registry=registry
        )
        self.incarnation = Gauge("rlhf_trainer_incarnation", "Starts of this run's trainer.", registry=registry)
        self.phase_seconds = Histogram(
            "rlhf_trainer_phase_seconds",
            "Duration of each phase of a step.",
            ["phase"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.waiting = Gauge(
            "rlhf_trainer_waiting",
            "1 while the trainer can't go on because of this.",
            ["on"],
            registry=registry,
        )
        for on in ("policy", "reward"):
            self.waiting.labels(on=on).set(0)
        self.generated_tokens = Counter(
            "rlhf_trainer_generated_tokens", "Completion tokens received, training and evaluation.", registry=registry
        )
        self.tokens_per_second = Gauge(
            "rlhf_trainer_tokens_per_second",
            "Completion tokens trained on in the last step over its seconds.",
            registry=registry,
        )
        self.samples_trained = Counter("rlhf_trainer_samples_trained", "Samples trained on.", registry=registry)
        self.samples_dropped = Counter(
            "rlhf_trainer_samples_dropped", "Prompts not trained on, by reason.", ["reason"], registry=registry
        )
        self.publishes = Counter(
            "rlhf_trainer_publishes", "Weights brought live on the policy server.", registry=registry
        )
        self.checkpoints = Counter("rlhf_trainer_checkpoints", "Checkpoints written.", registry=registry)

    def set_statistics(self, statistics: Mapping[str, float | None]) -> None:
        """One gauge per statistic: `objective/kl` becomes rlhf_trainer_objective_kl; None (undefined) becomes NaN."""
        for name, value in statistics.items():
            if name not in self._statistics:
                metric = "rlhf_trainer_" + re.sub(r"[^a-zA-Z0-9_]", "_", name)
                self._statistics[name] = Gauge(metric, f"Last step's {name}.", registry=self._registry)
            self._statistics[name].set(float("nan") if value is None else value)
