"""Clocks that are set while a run goes on: deadlines, backoff and leases of calls follow time that only passes."""

from __future__ import annotations

import itertools
import json
from datetime import datetime
from pathlib import Path

import pytest

from tests.integration.failures import Judge, assert_nothing_lost, steps_made
from tests.integration.training import EVALUATION, STEP, World, assert_finished, assert_same_bits
from tests.support.clocks import JumpingClock
from tests.support.processes import ProcessUnderTest, wait_for

HOUR = 3600


def seconds_between_lines(process: ProcessUnderTest) -> list[float]:
    whole = [line for line in process.log_text().splitlines(keepends=True) if line.endswith("\n")]
    lines = [json.loads(line) for line in whole if line.startswith("{")]
    times = [datetime.fromisoformat(line["timestamp"]).timestamp() for line in lines]
    return [later - earlier for earlier, later in itertools.pairwise(times)]


@pytest.mark.slow
def test_clocks_that_jump_an_hour_either_way_change_nothing(world: World, uninterrupted: str, tmp_path: Path) -> None:
    clock = JumpingClock(tmp_path)
    judge = Judge(world, "clock", allow=EVALUATION + STEP, env=clock.env)
    policy = world.policy_server(env=clock.env)
    trainer = world.trainer(
        "clock", reward=judge.server, policy_server=policy.address, env=clock.env, log_format="json"
    )
    steps_made(world, "clock", 1)
    clock.jump(HOUR)
    judge.allow(EVALUATION + 2 * STEP)  # a second step, not the evaluation after it
    wait_for(
        lambda: max(seconds_between_lines(trainer)) > HOUR - 60, within=120, what="jump ahead in the trainer's log"
    )
    clock.jump(-HOUR)
    judge.allow_all()

    assert_finished(trainer)
    assert_same_bits(world, "clock", uninterrupted)
    assert_nothing_lost(world, "clock", judge)
    assert min(seconds_between_lines(trainer)) < -HOUR, "the trainer saw no jump back"
