"""Several policy servers in one run: replicas that die, come back, are added, or are not of this run."""

from __future__ import annotations

import signal
from functools import partial
from pathlib import Path

import pytest

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

# Answers no more samples than the file beside it says.
METERED = """
import pathlib, time
ALLOWED = pathlib.Path(__file__).with_suffix(".allowed")
asked = 0
def reward(prompts, completions, **columns):
    global asked
    asked += len(completions)
    while asked > int(ALLOWED.read_text() or 0):
        time.sleep(0.01)
    return [sum(text.count(letter) for letter in "aeiou ") / (1 + len(text)) for text in completions]
"""


class Metered:
    """A reward server of the world's reward that judges as many samples as it may."""

    def __init__(self, world: World, name: str, allowed: int) -> None:
        self._file = world.folder / f"{name}.allowed"
        self.allow(allowed)
        self.server = world.reward_server(METERED, name=name)

    def allow(self, samples: int) -> None:
        """So many altogether."""
        self._file.write_text(str(samples))


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
    reward = Metered(world, "metered-killed", EVALUATION + STEP)
    other = world.policy_server()
    other.wait_serving("rlhf.weights.v1.WeightsService")
    trainer = world.trainer(
        "replicas", reward=reward.server, policy_server=f"{world.policy.address},{other.address}", run_id="replicas"
    )
    wait_for(lambda: world.steps_done("replicas") >= 1, within=120, what="first step")
    wait_for(lambda: replicas(trainer, "usable") == 2, within=60, what="both replicas")
    reward.allow(EVALUATION * 2 + STEP * 3)
    wait_for(lambda: stopped_in_mid_call(trainer, other), within=60, what="call in flight to the other replica")
    other.kill()
    wait_for(lambda: replicas(trainer, "away") == 1, within=60, what="notice that the replica is away")
    assert metric(trainer, "rlhf_trainer_waiting", on="policy") == 0, "one replica is enough to go on"
    wait_for(lambda: world.steps_done("replicas") == 3, within=60, what="steps without it")
    again = world.policy_server(listen=other.address)
    again.wait_serving("rlhf.weights.v1.WeightsService")
    wait_for(lambda: replicas(trainer, "usable") == 2, within=60, what="the replica to join")
    reward.allow(10**6)

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
    reward = Metered(world, "metered-stranger", EVALUATION)
    other = world.policy_server()
    other.wait_serving("rlhf.weights.v1.WeightsService")
    trainer = world.trainer(
        "left-out", reward=reward.server, policy_server=f"{world.policy.address},{other.address}", steps=2
    )
    evaluated = partial(world.lines, "left-out", "metrics.jsonl", "evaluation")
    wait_for(evaluated, within=120, what="evaluation, before which the start's checks were over")
    other.kill()
    wrong = world.policy_server(listen=other.address, model=stranger)
    wrong.wait_serving("rlhf.weights.v1.WeightsService")
    reward.allow(EVALUATION + STEP)
    wait_for(lambda: replicas(trainer, "refused") == 1, within=60, what="the stranger to be refused")
    reward.allow(10**6)

    assert_finished(trainer)
    assert_accounted_once(world, "left-out")
    assert "a policy server is left out" in trainer.log_text()
    assert generated(wrong) == 0
