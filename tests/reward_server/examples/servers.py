"""The six example servers, as `make examples` built them, and one of them as a process."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.support.processes import ROOT, wait_for

FOLDER = ROOT / "reward_server" / "examples"
STARTS_WITHIN = 30.0
# A drain may take 10 seconds, and the machine may be busy.
STOPS_WITHIN = 60.0


@dataclass(frozen=True)
class Example:
    """A language's server: what starts it, from its folder; `built` is there once it is built."""

    language: str
    run: tuple[str, ...]
    built: Path

    @property
    def folder(self) -> Path:
        """Where its sources are."""
        return FOLDER / self.language


# As the Makefile sets it.
_CARGO_TARGET = Path(os.environ.get("CARGO_TARGET_DIR") or Path.home() / ".cache" / "rlhf-services" / "cargo")


def _npm_start() -> tuple[str, ...]:
    package = FOLDER / "typescript" / "package.json"
    return tuple(shlex.split(json.loads(package.read_text())["scripts"]["start"]))


EXAMPLES = {
    example.language: example
    for example in (
        Example("go", ("bin/reward",), FOLDER / "go/bin/reward"),
        Example("rust", (str(_CARGO_TARGET / "release/reward"),), _CARGO_TARGET / "release/reward"),
        # Not by npm, which does not hand the signals on.
        Example("typescript", _npm_start(), FOLDER / "typescript/dist"),
        Example("java", ("java", "-jar", "target/reward.jar"), FOLDER / "java/target/reward.jar"),
        Example("cpp", ("build/reward",), FOLDER / "cpp/build/reward"),
        Example("python", (sys.executable, "server.py"), FOLDER / "python/server.py"),
    )
}


class ExampleServer:
    """One running server, its output in files of `folder`."""

    def __init__(self, example: Example, folder: Path, listen: str) -> None:
        assert example.built.exists(), (
            f"{example.built} is not there; build it first: make examples EXAMPLES={example.language}"
        )
        folder.mkdir()
        self._stdout, self._stderr = folder / "stdout.txt", folder / "stderr.txt"
        with self._stdout.open("wb") as stdout, self._stderr.open("wb") as stderr:
            self._process = subprocess.Popen(
                example.run,
                cwd=example.folder,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env={**os.environ, "LISTEN": listen},
            )

    @property
    def address(self) -> str:
        """Where it says that it listens; "" when it has not said so yet."""
        for line in self._stdout.read_text().splitlines(keepends=True):
            if line.startswith("listening on ") and line.endswith("\n"):
                return line.removeprefix("listening on ").strip()
        return ""

    def wait_bound(self) -> None:
        """Until it says that it listens."""
        wait_for(lambda: self._alive() and self.address, within=STARTS_WITHIN, what="line `listening on`")

    def poll(self) -> int | None:
        """Its exit status, None while it runs."""
        return self._process.poll()

    def signal(self) -> None:
        """SIGTERM."""
        self._process.send_signal(signal.SIGTERM)

    def wait_exit(self) -> int:
        """Its exit status, once it has ended."""
        try:
            return self._process.wait(STOPS_WITHIN)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still runs after {STOPS_WITHIN:g} s; it wrote:\n{self._output()}") from None

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self._process.kill()
        self._process.wait()

    def _alive(self) -> bool:
        code = self.poll()
        assert code is None, f"ended with {code}; it wrote:\n{self._output()}"
        return True

    def _output(self) -> str:
        return self._stdout.read_text(errors="replace") + self._stderr.read_text(errors="replace")[-4000:]
