"""Every Prometheus metric of the trainer."""

from __future__ import annotations

import contextlib
import math
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from rlhf.logs import get_logger

_log = get_logger(__name__)

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000)
# Reward servers choose these names; each is a time series for as long as the process lives.
_MOST_COMPONENTS = 100
_MOST_CODES = 50


class TrainerMetrics:
    """Gauges follow the last completed step; one instance per registry."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._registry = registry
        self._statistics: dict[str, Gauge | None] = {}
        self._components: set[str] = set()
        self._codes: set[str] = set()
        self._run_info = Gauge(
            "rlhf_trainer_run_info", "1 for the run that this process trains.", ["run_id"], registry=registry
        )
        self._finished = Gauge(
            "rlhf_trainer_finished", "1 once the run's last checkpoint and its model are written.", registry=registry
        )
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
        self._pending_samples = Gauge(
            "rlhf_trainer_pending_samples",
            "Samples whose reward is asked for and not final yet: in line, in a call, or PENDING.",
            registry=registry,
        )
        self.generated_tokens = Counter(
            "rlhf_trainer_generated_tokens",
            "Completion tokens received in steps, of dropped samples too; evaluations are left out.",
            registry=registry,
        )
        self.tokens_per_second = Gauge(
            "rlhf_trainer_tokens_per_second",
            "Completion tokens received in the last step, of dropped samples too, over its seconds.",
            registry=registry,
        )
        self.reward_component = Gauge(
            "rlhf_trainer_reward_component",
            "Last step's mean of each component that the reward server names.",
            ["name"],
            registry=registry,
        )
        self.samples_trained = Counter("rlhf_trainer_samples_trained", "Samples trained on.", registry=registry)
        self._samples_dropped = Counter(
            "rlhf_trainer_samples_dropped",
            "Prompts not trained on, by reason, and by the reward server's code where it failed.",
            ["reason", "code"],
            registry=registry,
        )
        self.journal_answers = Counter(
            "rlhf_trainer_journal_answers",
            "Samples whose reward an earlier start of the run had got already.",
            registry=registry,
        )
        self.publishes = Counter(
            "rlhf_trainer_publishes",
            "Weights brought live on a policy server; a set counts once, however many replicas get it.",
            registry=registry,
        )
        self.policy_replicas = Gauge(
            "rlhf_trainer_policy_replicas",
            "Policy servers known: usable, away, or refused because they are not servers of this run.",
            ["state"],
            registry=registry,
        )
        self.policy_calls = Gauge(
            "rlhf_trainer_policy_calls_in_flight",
            "Calls in flight to each policy server.",
            ["replica"],
            registry=registry,
        )
        self.checkpoints = Counter("rlhf_trainer_checkpoints", "Checkpoints written.", registry=registry)
        self.checkpoint_timestamp = Gauge(
            "rlhf_trainer_checkpoint_timestamp_seconds",
            "When the newest checkpoint was written; while there is none, when the first step could begin.",
            registry=registry,
        )
        self.checkpoint_bytes = Gauge(
            "rlhf_trainer_checkpoint_bytes", "Size of the newest checkpoint; 0 while there is none.", registry=registry
        )
        self._run_dir_free = Gauge(
            "rlhf_trainer_run_dir_free_bytes", "Room on the disk of the run's folder.", registry=registry
        )
        self._run_dir_size = Gauge(
            "rlhf_trainer_run_dir_size_bytes", "Size of the disk of the run's folder.", registry=registry
        )
        self._kl_target = Gauge(
            "rlhf_trainer_kl_target",
            "KL that the run is to keep near, in nats per completion (--target).",
            registry=registry,
        )
        self._logprob_gap_limit = Gauge(
            "rlhf_trainer_logprob_gap_limit",
            "Gap between trainer and policy server above which a step warns, in nats per token.",
            registry=registry,
        )

    def describe_run(self, run_id: str, folder: Path, *, kl_target: float, logprob_gap_limit: float) -> None:
        """What stays as it is while the process lives, and the disk of the run's folder, looked at by every scrape."""
        self._run_info.labels(run_id=run_id).set(1)
        self._kl_target.set(kl_target)
        self._logprob_gap_limit.set(logprob_gap_limit)
        self._run_dir_free.set_function(lambda: _disk(folder)[1])
        self._run_dir_size.set_function(lambda: _disk(folder)[0])

    def watch_rewards(self, pending: Callable[[], int]) -> None:
        """Every scrape asks how many samples wait for their reward."""
        self._pending_samples.set_function(pending)

    def finish(self, seen: Callable[[], object]) -> None:
        """Say that the run is over; `seen` is called, on a thread of the endpoint's, by every scrape that tells so."""

        def finished() -> float:
            with contextlib.suppress(RuntimeError):  # the event loop that wanted to know has ended
                seen()
            return 1.0

        self._finished.set_function(finished)

    def set_statistics(self, statistics: Mapping[str, float | None]) -> None:
        """One gauge per statistic: `objective/kl` becomes rlhf_trainer_objective_kl; None (undefined) becomes NaN.

        A statistic whose name would be another metric's is left out with a warning.
        """
        for name, value in statistics.items():
            if name not in self._statistics:
                self._statistics[name] = self._statistic_gauge(name)
            gauge = self._statistics[name]
            if gauge is not None:
                gauge.set(float("nan") if value is None else value)

    def set_reward_components(self, components: Mapping[str, float]) -> None:
        """The last step's mean of each component; those that are new once there are many are left out."""
        for name, value in components.items():
            if name not in self._components:
                if len(self._components) == _MOST_COMPONENTS:
                    continue
                self._components.add(name)
                if len(self._components) == _MOST_COMPONENTS:
                    _log.warning("the metrics show no further reward components", shown=_MOST_COMPONENTS)
            self.reward_component.labels(name=name).set(value)

    def count_dropped(self, reason: str, code: str, count: int) -> None:
        """`code` is what the reward server gave, "" for other reasons; "OTHER" once there are many codes."""
        if code not in self._codes and len(self._codes) == _MOST_CODES:
            code = "OTHER"
        elif code:
            self._codes.add(code)
        self._samples_dropped.labels(reason=reason, code=code).inc(count)

    def _statistic_gauge(self, name: str) -> Gauge | None:
        metric = "rlhf_trainer_" + re.sub(r"[^a-zA-Z0-9_]", "_", name)
        try:
            return Gauge(metric, f"Last step's {name}.", registry=self._registry)
        except ValueError:
            _log.warning("a statistic has the name of another metric and is not shown there", name=name, metric=metric)
            return None


def _disk(folder: Path) -> tuple[float, float]:
    """Size and free bytes of the folder's disk; NaN when it is gone, as the other metrics matter all the more then."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return math.nan, math.nan
    return usage.total, usage.free
