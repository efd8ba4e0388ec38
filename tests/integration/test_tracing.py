"""Traces of a run over three real processes, as an OTLP receiver gets them; and a run whose receiver goes away."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pytest

from tests.integration.training import EVALUATION, STEP, World, assert_finished, small_world
from tests.support.otlp import SOON, Receiver, Span, receiver
from tests.support.processes import ProcessUnderTest, wait_for

STEPS = 3
PROCESSES = {"rlhf-trainer", "rlhf-policy-server", "rlhf-reward-server"}
GENERATE = "rlhf.policy.v1.PolicyService/Generate"
LOG_PROBS = "rlhf.policy.v1.PolicyService/LogProbs"
UPDATE = "rlhf.weights.v1.WeightsService/UpdateWeights"
SCORE = "rlhf.reward.v1.RewardService/Score"
SERVER, CLIENT = 2, 3


@dataclass
class Traced:
    """A finished run that was one version ahead of itself, and what its three processes told."""

    world: World
    told: Receiver

    def step(self, number: int) -> Span:
        (step,) = self.told.named("step", step=number)
        return step

    def rollout(self, number: int) -> Span:
        (rollout,) = self.told.named("rollout", step=number)
        return rollout

    def answered(self, method: str, below: Span) -> list[Span]:
        """The calls of a method that servers answered for what `below` stands for."""
        served = [span for span in self.told.named(method) if span.kind == SERVER]
        return [span for span in served if below in self.told.ancestors(span)]


def samples_of(spans: Iterable[Span]) -> int:
    return sum(span.attributes["rlhf.samples"] for span in spans)


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traced]:
    with receiver() as told, pytest.MonkeyPatch.context() as environment:
        for process in ("POLICY", "REWARD", "TRAINER"):
            environment.setenv(f"RLHF_{process}_OTLP_ENDPOINT", told.endpoint)
        for name, value in SOON.items():
            environment.setenv(name, value)
        with small_world(tmp_path_factory.mktemp("traced")) as world:
            assert_finished(world.trainer("traced", reproducible=False, max_staleness=1, steps=STEPS, eval_every=0))
            wait_for(lambda: len(told.named(UPDATE)) == 2 * (STEPS + 1), within=30, what="spans of every publish")
            judged = STEPS * STEP + 2 * EVALUATION  # before the first step, after the last
            wait_for(lambda: samples_of(told.named("judge")) == judged, within=30, what="spans of every reward")
            yield Traced(world, told)


def test_a_step_is_one_trace_over_the_three_processes(traced: Traced) -> None:
    step = traced.step(1)
    assert step.parent_id == ""
    together = [span for span in traced.told.spans if span.trace_id == step.trace_id]
    assert {span.service for span in together} == PROCESSES

    children = {span.name for span in together if span.parent_id == step.span_id}
    assert children == {"rollout", "learn", "publish"}
    rollout = traced.rollout(1)
    assert len(traced.answered(GENERATE, rollout)) == STEP
    assert len(traced.answered(LOG_PROBS, rollout)) >= 1
    (update,) = traced.answered(UPDATE, step)
    assert "publish" in [span.name for span in traced.told.ancestors(update)]


def test_reward_micro_batches_are_children_of_the_step_that_they_are_for(traced: Traced) -> None:
    batches = traced.told.named("score", step=1)
    assert samples_of(batches) == STEP
    for batch in batches:
        assert [span.name for span in traced.told.ancestors(batch)] == ["rollout", "step"]
    judged = [span for span in traced.told.named("judge") if traced.step(1) in traced.told.ancestors(span)]
    assert samples_of(judged) == STEP
    line = [(span.service, span.name, span.kind) for span in traced.told.ancestors(judged[0])[:3]]
    assert line == [
        ("rlhf-reward-server", SCORE, SERVER),
        ("rlhf-trainer", SCORE, CLIENT),
        ("rlhf-trainer", "score", 1),
    ]


def test_a_rollout_made_during_another_step_is_linked_and_no_child(traced: Traced) -> None:
    for number in range(2, STEPS + 1):
        rollout, step = traced.rollout(number), traced.step(number)
        assert rollout.parent_id == ""
        assert rollout.trace_id not in {traced.step(each).trace_id for each in range(1, STEPS + 1)}
        assert rollout.links == (traced.step(number - 1).place,)
        assert step.links == (rollout.place,)
        assert len(traced.answered(GENERATE, rollout)) == STEP
    assert traced.step(1).links == ()


def test_spans_carry_run_step_version_and_counts_but_no_text(traced: Traced) -> None:
    assert traced.step(2).attributes["rlhf.run_id"] == "traced"
    assert traced.step(2).attributes["rlhf.version"] == 1
    (learn,) = traced.told.named("learn", step=2)
    assert learn.attributes["rlhf.samples"] == STEP
    for call in traced.answered(GENERATE, traced.rollout(2)):
        assert call.attributes["rlhf.run_id"] == "traced"
        assert call.attributes["rlhf.step"] == 2
        assert 0 < call.attributes["rlhf.completion_tokens"] <= 32
        assert call.attributes["rpc.response.status_code"] == "OK"
    texts = [line["prompt"] for line in traced.world.lines("traced", "samples.jsonl")]
    texts += [line["completion"] for line in traced.world.lines("traced", "samples.jsonl")]
    sent = b"".join(traced.told.requests)
    assert texts
    assert not [text for text in texts if len(text) > 4 and text.encode() in sent]


def test_histograms_of_latency_lead_to_traces(traced: Traced) -> None:
    known = {span.trace_id for span in traced.told.spans}
    for process, histogram in (
        (traced.world.policy, "grpc_server_handling_seconds"),
        (traced.world.reward, "grpc_server_handling_seconds"),
        (traced.world.reward, "rlhf_reward_batch_seconds"),
    ):
        exemplars = exemplars_of(process, histogram)
        assert exemplars, histogram
        assert exemplars <= known


@pytest.mark.slow
def test_a_receiver_that_dies_neither_stops_the_run_nor_fills_its_log(traced: Traced) -> None:
    with receiver() as short_lived:
        trainer = traced.world.trainer(
            "untold", f"--otlp-endpoint={short_lived.endpoint}", steps=40, eval_every=0, eval_prompts=1, save_every=100
        )
        wait_for(lambda: short_lived.named("step"), within=90, what="span of a step")
        assert exemplars_of(trainer, "rlhf_trainer_phase_seconds")
    before = traced.world.steps_done("untold")
    wait_for(lambda: "can't be delivered" in trainer.log_text(), within=60, what="word of lost traces")
    wait_for(lambda: traced.world.steps_done("untold") > before, within=60, what="another step")
    trainer.signal(signal.SIGTERM)
    assert trainer.wait_exit(within=60) == 143
    log = trainer.log_text()
    assert log.count("traces can't be delivered") == 1
    assert "opentelemetry" not in log


def exemplars_of(process: ProcessUnderTest, histogram: str) -> set[str]:
    """Trace ids behind the buckets of a histogram, as Prometheus asks for them."""
    text = process.metrics_text(accept="application/openmetrics-text")
    return set(re.findall(rf'^{histogram}_bucket.* # \{{trace_id="(\w+)"\}}', text, re.MULTILINE))
