"""A trainer that is killed, stands still, or can't write goes on from its folder, and asks nobody twice."""

from __future__ import annotations

import contextlib
import random
import signal
import time
from collections.abc import Callable

import pytest

from tests.integration.failures import Judge, assert_nothing_lost, journal_lines
from tests.integration.training import EVALUATION, STEP, World, assert_finished, assert_same_bits, metric
from tests.support.disks import files_of_at_most
from tests.support.processes import ProcessUnderTest, wait_for

KILLS = 30
STEPS = 40


def test_no_answer_is_asked_for_again_after_a_kill(world: World, uninterrupted: str) -> None:
    judge = Judge(world, "journal", allow=EVALUATION + STEP + 5)
    trainer = world.trainer("journal", reward=judge.server)
    judge.holds()
    # The evaluation's answers went with the first checkpoint.
    wait_for(
        lambda: journal_lines(world, "journal") == len(judge.given("journal")) - EVALUATION, within=60, what="journal"
    )
    trainer.kill()
    judge.holds_nothing()
    judge.allow_all()
    again = world.trainer("journal", "--resume", reward=judge.server)

    assert_finished(again)
    assert_same_bits(world, "journal", uninterrupted)
    assert_nothing_lost(world, "journal", judge)
    assert "rewards came from the journal, so nobody was asked" in again.log_text()


def test_a_disk_that_is_full_at_a_checkpoint_ends_the_run_by_name_and_costs_nothing_before(
    world: World, uninterrupted: str
) -> None:
    judge = Judge(world, "disk", allow=EVALUATION + STEP)
    trainer = world.trainer("disk", reward=judge.server)
    checkpoints = world.folder / "disk" / "checkpoints"
    wait_for((checkpoints / "step-000001").exists, within=120, what="first checkpoint")
    with files_of_at_most(100_000, pid=trainer.pid):  # less than the weights take, more than any other file
        judge.allow_all()
        assert trainer.wait_exit(within=120) == 1
    assert f"can't write {checkpoints / 'step-000002'}" in trainer.log_text()
    assert "Traceback" not in trainer.log_text()
    assert [folder.name for folder in checkpoints.iterdir()] == ["step-000001"]

    assert_finished(world.trainer("disk", "--resume", reward=judge.server))
    assert_same_bits(world, "disk", uninterrupted)
    assert_nothing_lost(world, "disk", judge)


@pytest.mark.slow
def test_a_trainer_that_stood_still_beyond_every_deadline_goes_on(world: World, uninterrupted: str) -> None:
    judge = Judge(world, "frozen", allow=EVALUATION + STEP + 3)
    trainer = world.trainer("frozen", reward=judge.server, reward_timeout=1.0, policy_timeout=2.0)
    judge.holds()
    trainer.signal(signal.SIGSTOP)
    judge.allow_all()
    time.sleep(3)  # longer than both deadlines: that time passes is what is tested here, not waited for
    trainer.signal(signal.SIGCONT)

    assert_finished(trainer)
    assert_same_bits(world, "frozen", uninterrupted)
    assert_nothing_lost(world, "frozen", judge, asked_once=False)


class ManyKills:
    """A run of a trainer that is killed again and again."""

    def __init__(self, world: World, judge: Judge, run: str) -> None:
        self._world, self._judge, self._run = world, judge, run
        self._starts = 0
        self._chance = random.Random(0)

    def start(self) -> ProcessUnderTest:
        """Of the trainer, which goes on."""
        self._starts += 1
        save_every = self._chance.choice([1, 2])
        return self._world.trainer(
            self._run, "--resume", reward=self._judge.server, steps=STEPS, save_every=save_every, keep_checkpoints=2
        )

    def start_and_kill(self, moment: Callable[[], Callable[[], bool]]) -> None:
        """`moment()` is asked when the run goes on, what it returns from then on: now?"""
        trainer = self.start()
        wait_for(
            lambda: metric(trainer, "rlhf_trainer_incarnation") == self._starts, within=120, what="run that goes on"
        )
        now = moment()
        while not now():
            assert trainer.poll() is None, f"over before kill {self._starts}:\n{trainer.log_text()[-4000:]}"
        trainer.kill()

    def half_a_checkpoint(self) -> Callable[[], bool]:
        """While the next is written."""
        left_behind = self._half_written()
        return lambda: bool(self._half_written() - left_behind)

    def rewards_in_flight(self) -> Callable[[], bool]:
        """When some of a step's answers have come."""
        answers = len(self._judge.given(self._run)) + self._chance.randrange(1, 8)
        return lambda: len(self._judge.given(self._run)) >= answers

    def any_moment(self, within: float) -> Callable[[], bool]:
        """At most so many seconds from now: the first publish, a rollout, an update, the next publish …"""
        moment = time.monotonic() + self._chance.uniform(0, within)
        return lambda: time.monotonic() >= moment

    def _half_written(self) -> set[tuple[str, int]]:
        found = set()
        for folder in (self._world.folder / self._run / "checkpoints").glob(".partial-*"):
            with contextlib.suppress(FileNotFoundError):
                found.add((folder.name, folder.stat().st_ctime_ns))
        return found


@pytest.mark.slow
@pytest.mark.timeout(1800)  # 31 starts, on a machine that may do other work
def test_thirty_kills_at_random_moments_of_a_run_change_no_bit_of_it(world: World) -> None:
    judge = Judge(world, "thirty")
    left_alone = ManyKills(world, judge, "left-alone")
    assert_finished(left_alone.start())
    a_step = sum(line["time/step"] for line in world.lines("left-alone", "metrics.jsonl", "step")) / STEPS
    thirty = ManyKills(world, judge, "thirty")

    for _ in range(KILLS // 3):
        thirty.start_and_kill(thirty.half_a_checkpoint)
        thirty.start_and_kill(thirty.rewards_in_flight)
        thirty.start_and_kill(lambda: thirty.any_moment(3 * a_step))
    assert_finished(thirty.start())

    assert_same_bits(world, "thirty", "left-alone")
    assert world.accounting("thirty") == world.accounting("left-alone")
    assert_nothing_lost(world, "thirty", judge, asked_once=False)
    given = judge.given("thirty")
    assert len(given) - len(dict(given)) < KILLS, "answers that were on their way at a kill are all that may be lost"
