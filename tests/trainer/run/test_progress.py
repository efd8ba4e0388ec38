"""What a person and a dashboard see of a run."""

from __future__ import annotations

import io
import re

import pytest
from prometheus_client import CollectorRegistry
from rich.console import Console

from rlhf.channel import Waiting
from trainer.metrics import TrainerMetrics
from trainer.run.progress import Progress
from trainer.run.waiting import WaitBoard

STATISTICS = {"ppo/mean_scores": 0.25, "objective/kl": 1.5, "tokens/responses_len_mean": 12.0, "undefined": None}


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def waits(registry: CollectorRegistry) -> WaitBoard:
    return WaitBoard(TrainerMetrics(registry))


def waiting(reason: str, since_seconds: float = 0.0) -> Waiting:
    return Waiting("a server", "127.0.0.1:7", since_seconds, 1, reason)


def shown(progress: Progress) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(progress.render())
    output = console.file
    assert isinstance(output, io.StringIO)
    return output.getvalue()


def test_the_panel_tells_step_phase_numbers_and_what_is_waited_for(waits: WaitBoard) -> None:
    progress = Progress(steps=20, waits=waits, live=False)
    waits.watch("reward").waiting("call", waiting("UNAVAILABLE: connection refused", since_seconds=3600.0))

    progress.step_done(3, STATISTICS)
    with progress.phase("rollout"):
        progress.count(5, 8)
        text = shown(progress)

    assert "step 3/20" in text
    assert "rollout 5/8" in text
    assert "reward 0.25  KL 1.50  length 12.00" in text
    told = r"waiting for the reward server 127\.0\.0\.1:7 for 36\d\d s: UNAVAILABLE: connection refused"
    assert re.search(told, text)


def test_a_live_panel_is_drawn(waits: WaitBoard) -> None:
    drawn = io.StringIO()
    console = Console(file=drawn, force_terminal=True, width=100)

    with Progress(steps=2, waits=waits, live=True, console=console) as progress:
        progress.step_done(1, STATISTICS)

    assert "step 1/2" in drawn.getvalue()


def test_without_a_terminal_a_step_is_one_line_with_its_numbers(
    waits: WaitBoard, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")

    with Progress(steps=20, waits=waits, live=False) as progress:
        progress.step_done(3, STATISTICS)
        progress.evaluated(3, {"reward_mean": 0.5, "kl_mean": None})

    assert caplog.messages == [
        "step 3/20 reward=0.25 KL=1.5 length=12.0",
        "evaluation after step 3 reward=0.5",
    ]


def test_a_wait_sets_the_gauge_until_the_server_answers(registry: CollectorRegistry, waits: WaitBoard) -> None:
    def gauge(on: str) -> float | None:
        return registry.get_sample_value("rlhf_trainer_waiting", {"on": on})

    assert (gauge("policy"), gauge("reward")) == (0, 0)
    watch = waits.watch("reward")
    watch.waiting("call", waiting("down"))
    watch.waiting("call", waiting("still down"))
    assert (gauge("policy"), gauge("reward")) == (0, 1)
    assert waits.waits["reward"].reason == "still down"
    watch.over("call")
    assert (gauge("reward"), dict(waits.waits)) == (0, {})


def test_a_wait_lasts_until_no_call_waits_and_counts_from_the_oldest_ones_first_attempt(
    waits: WaitBoard, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    watch = waits.watch("policy")

    watch.waiting("slow", waiting("DEADLINE_EXCEEDED", since_seconds=300.0))
    watch.waiting("late", waiting("OVERLOADED", since_seconds=10.0))
    watch.over("answered at once")
    assert waits.waits["policy"].seconds() >= 300
    watch.over("slow")
    assert 10 <= waits.waits["policy"].seconds() < 300
    watch.over("late")

    assert not waits.waits
    assert [message.partition(" target")[0] for message in caplog.messages] == [
        "waiting for the policy server",
        "no longer waiting for the policy server",
    ]


def test_statistics_become_gauges_under_names_that_prometheus_takes(registry: CollectorRegistry) -> None:
    metrics = TrainerMetrics(registry)

    metrics.set_statistics({"objective/kl": 2.0, "ppo/loss/total": None})
    metrics.set_statistics({"objective/kl": 3.0})

    assert registry.get_sample_value("rlhf_trainer_objective_kl") == 3.0
    undefined = registry.get_sample_value("rlhf_trainer_ppo_loss_total")
    assert undefined is not None
    assert undefined != undefined


@pytest.mark.parametrize("taken", ["step", "waiting", "reward-mean"])
def test_a_statistic_named_like_another_metric_stops_nothing(registry: CollectorRegistry, taken: str) -> None:
    metrics = TrainerMetrics(registry)
    metrics.step.set(7)

    metrics.set_statistics({"reward_mean": 1.0, taken: 2.0})
    metrics.set_statistics({"reward_mean": 3.0, taken: 4.0})

    assert registry.get_sample_value("rlhf_trainer_reward_mean") == 3.0
    assert registry.get_sample_value("rlhf_trainer_step") == 7.0


def test_reward_components_of_any_name_are_one_metric_of_bounded_size(registry: CollectorRegistry) -> None:
    metrics = TrainerMetrics(registry)

    metrics.set_statistics({"reward_mean": 1.0})
    metrics.set_reward_components({"mean": 2.0, "a.b": 3.0, "a_b": 4.0})
    metrics.set_reward_components({f"component {number}": 5.0 for number in range(1000)})
    metrics.set_reward_components({"mean": 6.0})

    def component(name: str) -> float | None:
        return registry.get_sample_value("rlhf_trainer_reward_component", {"name": name})

    assert [component(name) for name in ("mean", "a.b", "a_b", "component 0")] == [6.0, 3.0, 4.0, 5.0]
    assert component("component 999") is None


def test_failed_samples_are_counted_by_their_codes_of_which_there_may_be_few(registry: CollectorRegistry) -> None:
    metrics = TrainerMetrics(registry)

    metrics.count_dropped("abstained", "", 2)
    metrics.count_dropped("failed", "MISSING_METADATA", 1)
    for number in range(1000):
        metrics.count_dropped("failed", f"CODE_{number}", 1)
    metrics.count_dropped("failed", "MISSING_METADATA", 1)

    def dropped(reason: str, code: str) -> float | None:
        return registry.get_sample_value("rlhf_trainer_samples_dropped_total", {"reason": reason, "code": code})

    assert (dropped("abstained", ""), dropped("failed", "MISSING_METADATA"), dropped("failed", "CODE_0")) == (2, 2, 1)
    assert dropped("failed", "OTHER") == 951
