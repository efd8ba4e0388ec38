"""What tests that break things need: a judge that writes everything down, and what must hold whatever broke."""

from __future__ import annotations

import json
import signal
from collections import Counter
from pathlib import Path

import torch

from tests.integration.training import World, assert_accounted_once, metric
from tests.support.judge import Manner
from tests.support.processes import ProcessUnderTest, wait_for


class Judge:
    """A reward server of the world's reward that remembers nothing, and what it has given to whom.

    A run that it holds back, by `allow`, is where a test needs it to be for as long as that takes.
    """

    def __init__(
        self,
        world: World,
        name: str,
        manner: Manner = Manner.WELL,
        *,
        allow: int | None = None,
        env: dict[str, str] | None = None,
    ) -> None:
        """`allow`: as the method; None = all."""
        self._world = world
        self._env = env
        self._log = world.folder / f"{name}.given"
        self._gate = world.folder / f"{name}.allowed"
        self._held = self._gate.with_suffix(".held")
        if allow is not None:
            self.allow(allow)
        self.server = self._start(manner)

    def restart(self, manner: Manner = Manner.WELL) -> None:
        """Kill it and start it where it was."""
        self.server.kill()
        self.server = self._start(manner, listen=self.server.address)

    def replace(self, allow: int) -> None:
        """SIGTERM, let it answer `allow` samples, those that wait among them, and start another where it was."""
        address = self.server.address
        self.server.signal(signal.SIGTERM)
        self.allow(allow)
        assert self.server.wait_exit() == 0, self.server.log_text()[-4000:]
        self.server = self._start(Manner.WELL, listen=address)

    def allow(self, samples: int) -> None:
        """Answer so many of the samples that come from its start on; the others wait."""
        temporary = self._gate.with_suffix(".tmp")
        temporary.write_text(str(samples))
        temporary.replace(self._gate)

    def allow_all(self) -> None:
        """Answer whatever comes, and what waits."""
        self.allow(10**6)

    def holds(self) -> None:
        """Until a call waits for more to be allowed; by then every call before it is answered, as far as it knows."""
        wait_for(self._held.exists, within=120, what="call that waits at the judge")

    def holds_nothing(self) -> None:
        """Until no call waits: the calls of a trainer that was killed are cancelled a little later."""
        wait_for(lambda: not self._held.exists(), within=60, what="end of the calls that wait at the judge")

    def given(self, run: str) -> list[tuple[str, float]]:
        """Sample id and reward of each result that it has made for `run`, in their order."""
        written = self._log.read_text()
        lines = [json.loads(line) for line in written[: written.rfind("\n") + 1].splitlines()]
        return [(sample_id, reward) for sample_id, reward in lines if sample_id.startswith(f"{run}/")]

    def _start(self, manner: Manner, listen: str = "127.0.0.1:0") -> ProcessUnderTest:
        self._held.unlink(missing_ok=True)  # of one that was killed
        flags = ("--log", str(self._log), "--gate", str(self._gate), "--manner", manner.value)
        return self._world.start("tests.support.judge", *flags, listen=listen, env=self._env)


def assert_nothing_lost(world: World, run: str, judge: Judge, *, asked_once: bool = True) -> None:
    """Every prompt of a finished run is accounted once, with its reason, and every score is one that the judge gave.

    asked_once: nobody judged a sample twice. Else the last answer is the one that counts.
    """
    assert_accounted_once(world, run)
    given = judge.given(run)
    last = dict(given)
    for line in world.lines(run, "accounting.jsonl"):
        assert line["outcome"] == "trained" or line["reason"]
        if line["outcome"] == "trained":
            assert line["reward"] == last[line["sample_id"]]
    for step in world.lines(run, "metrics.jsonl", "step"):
        rewards = [line["reward"] for line in world.lines(run, "accounting.jsonl") if line["step"] == step["step"]]
        assert abs(step["ppo/mean_scores"] - torch.tensor(rewards).mean().item()) < 1e-6
    if asked_once:
        times = Counter(sample_id for sample_id, _ in given)
        assert [sample_id for sample_id in times if times[sample_id] > 1] == []


def waits_for(trainer: ProcessUnderTest, on: str) -> None:
    """Until the trainer says that it waits for the server."""
    wait_for(lambda: metric(trainer, "rlhf_trainer_waiting", on=on) == 1, within=60, what=f"wait for the {on} server")


def steps_made(world: World, run: str, steps: int) -> None:
    """Until so many steps are recorded."""
    wait_for(lambda: world.steps_done(run) >= steps, within=120, what=f"step {steps} of {run}")


def journal_lines(world: World, run: str) -> int:
    """Answers that are in the run's journal."""
    file: Path = world.folder / run / "journal.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0
