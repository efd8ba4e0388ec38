"""A policy server that dies, stands still, is cut off or gets mangled bytes costs a run nothing but time."""

from __future__ import annotations

import signal

import grpc
import pytest
from safetensors.torch import load_file

from rlhf.policy.v1 import policy_pb2, policy_pb2_grpc
from rlhf.weights.v1 import weights_pb2, weights_pb2_grpc
from tests.integration.failures import Judge, assert_nothing_lost, steps_made, waits_for
from tests.integration.training import EVALUATION, STEP, World, assert_finished, assert_same_bits, metric
from tests.policy_server.harness import generate, raw
from tests.support.processes import ProcessUnderTest, wait_for
from tests.support.proxy import Proxy

# Of the world's model some 150,000 bytes travel.
HALF_A_PUBLISH = 60_000


def generated(policy: ProcessUnderTest) -> float:
    return metric(policy, "grpc_server_handled_total", grpc_method="Generate", grpc_code="OK")


def refused_updates(policy: ProcessUnderTest) -> float:
    handled = metric(policy, "grpc_server_handled_total", grpc_method="UpdateWeights")
    return handled - metric(policy, "grpc_server_handled_total", grpc_method="UpdateWeights", grpc_code="OK")


class HeldAfterAStep:
    """A run whose judge holds the rewards of its second step, until it is let go on."""

    def __init__(self, world: World, run: str, **settings: object) -> None:
        self._policy = world.policy
        self._before = generated(world.policy)
        self.judge = Judge(world, run, allow=EVALUATION + STEP)
        self.trainer = world.trainer(run, reward=self.judge.server, **settings)

    def wait_in_mid_rollout(self) -> None:
        """Until the policy has begun with the second step."""
        answers = self._before + EVALUATION + STEP + 2
        wait_for(lambda: generated(self._policy) >= answers, within=120, what="rollouts of the second step")


def test_a_policy_server_killed_in_mid_rollout_gets_the_weights_and_the_prompts_again(
    world: World, uninterrupted: str
) -> None:
    run = HeldAfterAStep(world, "policy-killed")
    run.wait_in_mid_rollout()
    world.policy.kill()
    run.judge.allow_all()
    waits_for(run.trainer, "policy")
    world.restart_policy()

    assert_finished(run.trainer)
    assert_same_bits(world, "policy-killed", uninterrupted)
    assert_nothing_lost(world, "policy-killed", run.judge)
    assert "waiting for the policy server" in run.trainer.log_text()


def test_a_slow_line_that_is_partitioned_and_cut_changes_nothing(world: World, uninterrupted: str) -> None:
    judge = Judge(world, "partitioned", allow=EVALUATION + STEP)
    with Proxy(world.policy.address) as to_policy, Proxy(judge.server.address) as to_judge:
        for line in (to_policy, to_judge):
            line.bytes_per_second, line.delay_seconds = 1e6, 0.005
        trainer = world.trainer(
            "partitioned",
            reward=judge.server,
            policy_server=to_policy.address,
            reward_server=to_judge.address,
            policy_timeout=2.0,
            reward_timeout=1.0,
            publish_timeout=5.0,
        )
        judge.holds()
        to_judge.stall()
        judge.allow_all()
        waits_for(trainer, "reward")
        to_policy.stall()
        to_judge.heal()
        waits_for(trainer, "policy")
        assert to_policy.cut() >= 1
        to_policy.heal()
        assert_finished(trainer)

    assert_same_bits(world, "partitioned", uninterrupted)
    assert_nothing_lost(world, "partitioned", judge, asked_once=False)


def test_weights_mangled_on_their_way_are_never_served(world: World, uninterrupted: str) -> None:
    judge = Judge(world, "mangled", allow=EVALUATION + STEP)
    refused = refused_updates(world.policy)
    with Proxy(world.policy.address) as line:
        trainer = world.trainer("mangled", reward=judge.server, policy_server=line.address)
        steps_made(world, "mangled", 1)
        line.damage(what_stays(world), times=2)
        judge.allow_all()
        assert_finished(trainer)
        assert line.damages == 0

    assert_same_bits(world, "mangled", uninterrupted)
    assert_nothing_lost(world, "mangled", judge)
    assert refused_updates(world.policy) > refused


def what_stays(world: World) -> bytes:
    """Bytes that every publish sends: of a position that no completion reaches, so that no gradient moves it."""
    weights = load_file(world.model / "model.safetensors")
    # So few that they are hardly ever parted.
    return raw(weights["transformer.wpe.weight"][96, :8])


def live(policy: ProcessUnderTest) -> policy_pb2.WeightsVersion:
    with grpc.insecure_channel(policy.address) as channel:
        stub = weights_pb2_grpc.WeightsServiceStub(channel)  # type: ignore[no-untyped-call]
        answer: weights_pb2.GetWeightsResponse = stub.GetWeights(weights_pb2.GetWeightsRequest(), timeout=10)
        return answer.live


def completed_under(policy: ProcessUnderTest, weights: policy_pb2.WeightsVersion) -> policy_pb2.Completion:
    request = generate(weights=policy_pb2.WeightsPrecondition(exact=weights))
    with grpc.insecure_channel(policy.address) as channel:
        stub = policy_pb2_grpc.PolicyServiceStub(channel)  # type: ignore[no-untyped-call]
        answer: policy_pb2.GenerateResponse = stub.Generate(request, timeout=20)
        return answer.completions[0]


def test_half_a_publish_leaves_the_old_version_serving_and_a_new_process_gets_all_of_it(
    world: World, uninterrupted: str
) -> None:
    judge = Judge(world, "half-published", allow=EVALUATION + STEP)
    with Proxy(world.policy.address) as line:
        trainer = world.trainer("half-published", reward=judge.server, policy_server=line.address)
        steps_made(world, "half-published", 1)
        before = live(world.policy)
        line.stall(after=HALF_A_PUBLISH)
        judge.allow_all()
        wait_for(lambda: line.stalled, within=60, what="half a publish")

        assert live(world.policy) == before
        assert [span.weights for span in completed_under(world.policy, before).spans] == [before]
        world.policy.kill()
        line.heal()
        waits_for(trainer, "policy")
        world.restart_policy()
        assert_finished(trainer)

    assert_same_bits(world, "half-published", uninterrupted)
    assert_nothing_lost(world, "half-published", judge)


@pytest.mark.slow
def test_a_policy_server_that_stands_still_is_waited_for(world: World, uninterrupted: str) -> None:
    run = HeldAfterAStep(world, "policy-still", policy_timeout=2.0, publish_timeout=5.0)
    run.wait_in_mid_rollout()
    world.policy.signal(signal.SIGSTOP)
    run.judge.allow_all()
    waits_for(run.trainer, "policy")
    world.policy.signal(signal.SIGCONT)

    assert_finished(run.trainer)
    assert_same_bits(world, "policy-still", uninterrupted)
    assert_nothing_lost(world, "policy-still", run.judge)


@pytest.mark.slow
def test_a_policy_server_told_to_stop_in_mid_rollout_exits_0_and_its_successor_goes_on(
    world: World, uninterrupted: str
) -> None:
    run = HeldAfterAStep(world, "policy-stopped")
    run.wait_in_mid_rollout()
    address = world.policy.address
    assert world.policy.terminate() == 0
    run.judge.allow_all()
    world.policy = world.policy_server(listen=address)

    assert_finished(run.trainer)
    assert_same_bits(world, "policy-stopped", uninterrupted)
    assert_nothing_lost(world, "policy-stopped", run.judge)


@pytest.mark.slow
def test_a_policy_server_that_refuses_what_is_too_much_is_asked_again(world: World, uninterrupted: str) -> None:
    judge = Judge(world, "overload")
    small = world.policy_server("--max-queue-requests", "1", "--max-batch-rows", "1")
    trainer = world.trainer("overload", reward=judge.server, policy_server=small.address, rollout_concurrency=16)
    assert_finished(trainer)

    refused = metric(small, "grpc_server_handled_total", grpc_method="Generate", grpc_code="RESOURCE_EXHAUSTED")
    assert refused > 0
    assert_same_bits(world, "overload", uninterrupted)
    assert_nothing_lost(world, "overload", judge)
