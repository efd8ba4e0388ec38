"""Several policy servers in one run: replicas that die, come back, are added, or are not of this run."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.integration.failures import Judge
from tests.integration.training import (
    EVALUATION,
    STEP,
    World,
    assert_accounted_once,
    assert_finished,
    assert_same_bits,
    metric,
)
from tests.support.models import make_tiny_gpt2
from tests.support.processes import ProcessUnderTest, wait_for


def generated(policy: ProcessUnderTest) -> float:
    return metric(policy, "grpc_server_handled_total", grpc_method="Generate", grpc_code="OK")


def replicas(trainer: ProcessUnderTest, state: str) -> float:
    return metric(trainer, "rlhf_trainer_policy_replicas", state=state)


def stopped_in_mid_call(trainer: ProcessUnderTest, server: ProcessUnderTest) -> bool:
    """Whether the server, now stopped, owes the trainer an answer; it goes on if it doesn't."""
    server.signal(signal.SIGSTOP)
    name = "rlhf_trainer_policy_calls_in_flight"
    # An answer that is under way has arrived by the third reading.
    if all(metric(trainer, name, replica=server.address) > 0 for _ in range(3)):
        return True
    server.signal(signal.SIGCONT)
    return False


def test_a_replica_killed_in_mid_rollout_loses_nothing_and_joins_again_when_it_is_back(
    world: World, uninterrupted: str
) -> None:
    judge = Judge(world, "replicas", allow=EVALUATION + STEP)
    other = world.policy_server()
    other.wait_serving("rlhf.weights.v1.WeightsService")
    trainer = world.trainer(
        "replicas", reward=judge.server, policy_server=f"{world.policy.address},{other.address}", run_id="replicas"
    )
    wait_for(lambda: world.steps_done("replicas") >= 1, within=120, what="first step")
    wait_for(lambda: replicas(trainer, "usable") == 2, within=60, what="both replicas")
    judge.allow(EVALUATION * 2 + STEP * 3)
    wait_for(lambda: stopped_in_mid_call(trainer, other), within=60, what="call in flight to the other replica")
    other.kill()
    wait_for(lambda: replicas(trainer, "away") == 1, within=60, what="notice that the replica is away")
    assert metric(trainer, "rlhf_trainer_waiting", on="policy") == 0, "one replica is enough to go on"
    wait_for(lambda: world.steps_done("replicas") == 3, within=60, what="steps without it")
    again = world.policy_server(listen=other.address)
    again.wait_serving("rlhf.weights.v1.WeightsService")
    wait_for(lambda: replicas(trainer, "usable") == 2, within=60, what="the replica to join")
    judge.allow_all()

    assert_finished(trainer)
    assert_same_bits(world, "replicas", uninterrupted)
    assert_accounted_once(world, "replicas")
    assert world.accounting("replicas") == world.accounting(uninterrupted)
    assert "a policy server is away; the others go on" in trainer.log_text()
    assert "a policy server joined" in trainer.log_text()
    assert generated(again) > 0


@pytest.fixture(scope="module")
def stranger(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the world's size with another tokenizer."""
    return make_tiny_gpt2(tmp_path_factory.mktemp("stranger") / "model", vocab=300)


def test_a_replica_of_another_model_is_named_at_the_start(world: World, stranger: Path) -> None:
    wrong = world.policy_server(model=stranger)
    wrong.wait_serving("rlhf.weights.v1.WeightsService")

    trainer = world.trainer("stranger", policy_server=f"{world.policy.address},{wrong.address}", steps=1)

    assert trainer.wait_exit(within=120) == 78
    assert f"policy server {wrong.address} has" in trainer.log_text()


def test_a_replica_of_another_model_that_comes_later_is_left_out(world: World, stranger: Path) -> None:
    judge = Judge(world, "left-out", allow=EVALUATION)
    other = world.policy_server()
    other.wait_serving("rlhf.weights.v1.WeightsService")
    trainer = world.trainer(
        "left-out", reward=judge.server, policy_server=f"{world.policy.address},{other.address}", steps=2
    )
    wait_for(
        lambda: world.lines("left-out", "metrics.jsonl", "evaluation"),
        within=120,
        what="evaluation, before which the start's checks were over",
    )
    other.kill()
    wrong = world.policy_server(listen=other.address, model=stranger)
    wrong.wait_serving("rlhf.weights.v1.WeightsService")
    judge.allow(EVALUATION + STEP)
    wait_for(lambda: replicas(trainer, "refused") == 1, within=60, what="the stranger to be refused")
    judge.allow_all()

    assert_finished(trainer)
    assert_accounted_once(world, "left-out")
    assert "a policy server is left out" in trainer.log_text()
    assert generated(wrong) == 0
