"""The quickstarts of docs/reward-authors.md, followed word for word in a folder with only the contract and the kit."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes import ROOT, wait_for

pytestmark = pytest.mark.examples

PAGE = (ROOT / "docs" / "reward-authors.md").read_text()
SECTIONS = {"go": "## Fifteen minutes in Go\n", "typescript": "## Fifteen minutes in TypeScript\n"}
FILE = re.compile(r"^`([\w./]+)`[^\n]*:\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CONSOLE = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ADDRESS = "127.0.0.1:50052"
# A cold build of gRPC takes minutes on a busy machine.
STEP_SECONDS = 280


class Follower:
    """Does what a section says, in a folder of its own; the server that it starts runs until `stop`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # What `pip install` has brought is found first, as in an activated environment.
        path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
        self._environment = {**os.environ, "PATH": path}
        self._server: subprocess.Popen[bytes] | None = None
        self._address = ""

    def follow(self, command: str, shown: list[str]) -> None:
        """Run a command; what the page shows of its output must be in what it writes."""
        if command.endswith("&"):
            self._start(command.removesuffix("&").replace(ADDRESS, "127.0.0.1:0"))
            return
        done = subprocess.run(
            command.replace(ADDRESS, self._address or ADDRESS),
            shell=True,
            cwd=self.folder,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=STEP_SECONDS,
        )
        assert done.returncode == 0, f"$ {command}\n{done.stdout}"
        assert not [line for line in shown if line not in done.stdout.splitlines()], done.stdout

    def _start(self, command: str) -> None:
        log = self.folder / "server.log"
        with log.open("wb") as output:
            self._server = subprocess.Popen(
                f"exec env {command}", shell=True, cwd=self.folder, env=self._environment, stdout=output, stderr=output
            )
        (self._address,) = wait_for(
            lambda: re.findall(r"^listening on (\S+)\n", log.read_text(), re.MULTILINE), within=30, what="address"
        )

    def stop(self) -> int:
        """SIGTERM; the server's exit status."""
        assert self._server is not None
        self._server.send_signal(signal.SIGTERM)
        return self._server.wait(30)

    def kill(self) -> None:
        if self._server is not None:
            self._server.kill()
            self._server.wait()


@pytest.fixture
def follower(tmp_path: Path) -> Iterator[Follower]:
    contract = Path("protos/rlhf/reward/v1/reward.proto")
    (tmp_path / contract).parent.mkdir(parents=True)
    shutil.copy(ROOT / contract, tmp_path / contract)
    follower = Follower(tmp_path)
    yield follower
    follower.kill()


def commands(section: str) -> Iterator[tuple[str, list[str]]]:
    """Each command, with the lines of its output that the page shows."""
    for block in CONSOLE.findall(section):
        for step in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, *shown = step.splitlines()
            yield command, shown


@pytest.mark.timeout(900)
@pytest.mark.parametrize("language", SECTIONS)
def test_the_quickstart_makes_a_server_that_the_kit_passes(language: str, follower: Follower) -> None:
    section = PAGE.partition(SECTIONS[language])[2].partition("\n## ")[0]
    for name, content in FILE.findall(section):
        (follower.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (follower.folder / name).write_text(content)
    steps = list(commands(section))
    assert steps[-1][0].startswith("reward-conformance ")
    for command, shown in steps:
        follower.follow(command, shown)
    assert follower.stop() == 0
