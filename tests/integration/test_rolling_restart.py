"""Each component of one run is replaced by SIGTERM, one after the other, as an upgrade does."""

from __future__ import annotations

import signal

import pytest

from tests.integration.failures import Judge, assert_nothing_lost
from tests.integration.training import STEPS, World, assert_finished, assert_same_bits

EVALUATION, STEP = 4, 8


@pytest.mark.slow
def test_a_run_whose_three_processes_are_replaced_one_by_one_loses_nothing(world: World, uninterrupted: str) -> None:
    run = "rolled"
    judge = Judge(world, run)
    judge.allow(EVALUATION + STEP + 3)  # not all of the second step
    trainer = world.trainer(run, reward=judge.server)
    judge.holds()

    address = world.policy.address
    assert world.policy.terminate() == 0
    world.policy = world.policy_server(listen=address)

    # What the old one holds is answered; the new one holds again before the run's end.
    judge.replace(allow=EVALUATION + 2 * STEP)
    judge.holds()
    assert world.steps_done(run) < STEPS

    trainer.signal(signal.SIGTERM)
    assert trainer.wait_exit() == 143, trainer.log_text()[-4000:]
    judge.allow(10**6)
    assert_finished(world.trainer(run, "--resume", reward=judge.server))
    assert_same_bits(world, run, uninterrupted)
    assert_nothing_lost(world, run, judge, asked_once=False)
