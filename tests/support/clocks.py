"""A wall clock that a test may set, for processes that it starts."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

from tests.support.debian import required


class JumpingClock:
    """Processes started with `env` see the time of day moved by what `jump` said.

    Skips the test where there is no C compiler, but fails it in CI.
    """

    def __init__(self, folder: Path) -> None:
        compiler = required(shutil.which("cc"), "gcc")
        library = folder / "jumping_clock.so"
        source = Path(__file__).with_name("jumping_clock.c")
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True)
        self._file = folder / "seconds"
        self.jump(0)
        self.env = {"LD_PRELOAD": str(library), "JUMPING_CLOCK": str(self._file)}

    def jump(self, seconds: int) -> None:
        """From now on the clock is so far ahead of the real one."""
        with self._file.open("r+b" if self._file.exists() else "wb") as file:
            file.write(struct.pack("q", seconds))
