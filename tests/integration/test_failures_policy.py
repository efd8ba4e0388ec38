"""A policy server that dies, stands still, is cut off or gets mangled bytes costs a run nothing but time."""

from __future__ import annotations

import signal

import grpc
import pytest

from rlhf.policy.v1 import policy_pb2, policy_pb2_grpc
from rlhf.weights.v1 import weights_pb2, weights_pb2_grpc
from tests.integration.failures import Judge, assert_nothing_lost, steps_made, waits_for
from tests.integration.training import World, assert_accounted_once, assert_finished, assert_same_bits, metric
from tests.policy_server.harness import generate
from tests.support.processes import ProcessUnderTest, wait_for
from tests.support.proxy import Proxy

# Of the world's model some 150,000 bytes travel.
HALF_A_PUBLISH = 60_000


def generated(policy: ProcessUnderTest) -> float:
    return metric(policy, "grpc_server_handled_total", grpc_method="Generate", grpc_code="OK")


def refused_updates(policy: ProcessUnderTest) -> float:
    handled = metric(policy, "grpc_server_handled_total", grpc_method="UpdateWeights")
    return handled - metric(policy, "grpc_server_handled_total", grpc_method="UpdateWeights", grpc_code="OK")


def in_mid_rollout(world: World, run: str) -> None:
    steps_made(world, run, 1)
    answered = generated(world.policy)
    wait_for(lambda: generated(world.policy) >= answered + 2, within=60, what="rollouts of the next step")


def test_a_policy_server_killed_in_mid_rollout_gets_the_weights_and_the_prompts_again(
    world: World, uninterrupted: str
) -> None:
    judge = Judge(world, "policy-killed")
    trainer = world.trainer("policy-killed", reward=judge.server)
    in_mid_rollout(world, "policy-killed")
    world.policy.kill()
    waits_for(trainer, "policy")
    world.restart_policy()

    assert_finished(trainer)
    assert_same_bits(world, "policy-killed", uninterrupted)
    assert_nothing_lost(world, "policy-killed", judge)
    assert "waiting for the policy server" in trainer.log_text()


def test_a_slow_line_that_is_partitioned_and_cut_changes_nothing(world: World, uninterrupted: str) -> None:
    judge = Judge(world, "partitioned")
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
        steps_made(world, "partitioned", 1)
        to_judge.stall()
        waits_for(trainer, "reward")
        to_judge.heal()
        steps_made(world, "partitioned", 2)
        to_policy.stall()
        waits_for(trainer, "policy")
        assert to_policy.cut() >= 1
        to_policy.heal()
        assert_finished(trainer)

    assert_same_bits(world, "partitioned", uninterrupted)
    assert_nothing_lost(world, "partitioned", judge, asked_once=False)


def test_weights_mangled_on_their_way_are_never_served(world: World, uninterrupted: str) -> None:
    judge = Judge(world, "mangled")
    refused = refused_updates(world.policy)
    with Proxy(world.policy.address) as line:
        trainer = world.trainer("mangled", reward=judge.server, policy_server=line.address)
        steps_made(world, "mangled", 1)
        line.damages = 2  # nothing but weights travels in pieces that large
        assert_finished(trainer)
        assert line.damages == 0

    assert_same_bits(world, "mangled", uninterrupted)
    assert_nothing_lost(world, "mangled", judge)
    assert refused_updates(world.policy) > refused


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
    judge = Judge(world, "half-published")
    judge.allow(4 + 8)  # the evaluation and a step
    with Proxy(world.policy.address) as line:
        trainer = world.trainer("half-published", reward=judge.server, policy_server=line.address)
        steps_made(world, "half-published", 1)
        before = live(world.policy)
        line.stall(after=HALF_A_PUBLISH)
        judge.allow(10**6)
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
    judge = Judge(world, "policy-still")
    trainer = world.trainer("policy-still", reward=judge.server, policy_timeout=2.0)
    in_mid_rollout(world, "policy-still")
    world.policy.signal(signal.SIGSTOP)
    waits_for(trainer, "policy")
    world.policy.signal(signal.SIGCONT)

    assert_finished(trainer)
    assert_same_bits(world, "policy-still", uninterrupted)
    assert_nothing_lost(world, "policy-still", judge)


@pytest.mark.slow
def test_a_policy_server_told_to_stop_in_mid_rollout_exits_0_and_its_successor_goes_on(
    world: World, uninterrupted: str
) -> None:
    trainer = world.trainer("policy-stopped")
    in_mid_rollout(world, "policy-stopped")
    address = world.policy.address
    assert world.policy.terminate() == 0
    world.policy = world.policy_server(listen=address)

    assert_finished(trainer)
    assert_same_bits(world, "policy-stopped", uninterrupted)
    assert_accounted_once(world, "policy-stopped")


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
