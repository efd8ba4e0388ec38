"""Starts processes, tells where they listen, notices when one dies, and leaves none behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

_TAIL_LINES = 20


class ProcessDiedError(Exception):
    """A process ended when it should not have; the message holds the end of its log."""


@dataclass(frozen=True)
class Endpoint:
    """Where a process can be reached. `address` is None for one that serves metrics only."""

    pid: int
    address: str | None
    metrics_url: str | None

    @property
    def port(self) -> int | None:
        """The port of the service, or of the metrics where there is no service."""
        if self.address is not None:
            return int(self.address.rpartition(":")[2])
        return urlsplit(self.metrics_url).port if self.metrics_url is not None else None


class Child:
    """One `python -m module …`, its output in a log file, echoed to this process's output if asked for.

    With `terminal` it writes to the terminal itself, so that what it draws there lives; there is no log then. A program
    that is not ours says in its log where it listens.
    """

    def __init__(
        self, name: str, process: asyncio.subprocess.Process, log: Path | None, endpoint_file: Path | None
    ) -> None:
        self.name = name
        self._process = process
        self._log = log
        self._endpoint_file = endpoint_file
        self._exit = asyncio.create_task(process.wait())
        self._copy: asyncio.Task[None] | None = None

    @classmethod
    async def start(
        cls,
        module: str,
        arguments: Sequence[str],
        *,
        folder: Path,
        environment: Mapping[str, str],
        name: str = "",
        echo: bool = False,
        terminal: bool = False,
    ) -> Child:
        """Start it, with its log and endpoint file in `folder`; its name is the module's unless given."""
        name = name or module
        endpoint_file = folder / f"{name}.endpoint.json"
        endpoint_file.unlink(missing_ok=True)
        command = [sys.executable, "-m", module, *arguments, "--endpoint-file", str(endpoint_file)]
        log = None if terminal else folder / f"{name}.log"
        process = await cls._spawn(command, environment, terminal=terminal)
        child = cls(name, process, log, endpoint_file)
        if log is not None:
            child._copy = asyncio.create_task(child._copy_output(log, echo))
        return child

    @classmethod
    async def start_program(
        cls, name: str, command: Sequence[str], *, folder: Path, environment: Mapping[str, str]
    ) -> Child:
        """Start a server of another make, which prints "listening on host:port"."""
        log = folder / f"{name}.log"
        log.unlink(missing_ok=True)
        process = await cls._spawn(command, environment, terminal=False)
        child = cls(name, process, log, None)
        child._copy = asyncio.create_task(child._copy_output(log, echo=False))
        return child

    @staticmethod
    async def _spawn(
        command: Sequence[str], environment: Mapping[str, str], *, terminal: bool
    ) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=None if terminal else asyncio.subprocess.PIPE,
            stderr=None if terminal else asyncio.subprocess.STDOUT,
            env=dict(environment),
            # A session of its own: Ctrl-C reaches only us, and we stop everything in order.
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        """Of the process itself."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process.returncode is None

    async def wait(self) -> int:
        """Its exit status, once it has ended and all it wrote is in the log; negative: the signal that ended it."""
        status = await asyncio.shield(self._exit)
        if self._copy is not None:
            # A process of its own that it left behind may hold the pipe open for ever.
            await asyncio.wait([self._copy], timeout=2)
        return status

    async def endpoint(self) -> Endpoint:
        """Where it listens, however long it takes to: it may be fetching a model. Raises ProcessDiedError when it ends
        first.
        """
        while (endpoint := self._announced()) is None:
            if not self.running:
                await self.wait()
                raise ProcessDiedError(self.epitaph())
            await asyncio.sleep(0.05)
        return endpoint

    def _announced(self) -> Endpoint | None:
        if self._endpoint_file is None:
            assert self._log is not None
            text = self._log.read_text(errors="replace") if self._log.is_file() else ""
            line = re.search(r"^listening on (\S+)$", text, re.MULTILINE)
            return Endpoint(self.pid, line.group(1), None) if line else None
        if not self._endpoint_file.is_file():
            return None
        content = json.loads(self._endpoint_file.read_text())
        return Endpoint(content["pid"], content.get("address"), content.get("metrics_url"))

    def epitaph(self) -> str:
        """How it ended, and the last lines of its log."""
        status = self._process.returncode
        if status is None:
            how = "still runs"
        elif status < 0:
            how = f"was ended by {signal.Signals(-status).name}"
        else:
            how = f"ended with exit status {status}"
        text = f"{self.name} (pid {self.pid}) {how}."
        if self._log is not None and self._log.is_file():
            tail = self._log.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
            text += f" The end of {self._log}:\n" + "\n".join(f"  {line}" for line in tail)
        return text

    async def stop(self, grace_seconds: float) -> None:
        """SIGTERM, and SIGKILL after the grace; returns when it is gone."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            async with asyncio.timeout(grace_seconds):
                await self.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self.wait()

    async def _copy_output(self, log: Path, echo: bool) -> None:
        assert self._process.stdout is not None
        with log.open("wb") as file:
            while piece := await self._process.stdout.read(65536):
                file.write(piece)
                file.flush()
                if echo:
                    sys.stdout.buffer.write(piece)
                    sys.stdout.buffer.flush()


async def first_to_end(children: Sequence[Child]) -> Child:
    """Waits until one of them ends, and says which."""
    waits = {asyncio.create_task(child.wait()): child for child in children}
    done, pending = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    return waits[min(done, key=lambda task: children.index(waits[task]))]


async def stop_all(children: Sequence[Child], grace_seconds: float) -> None:
    """Stop them one after another, in this order, within `grace_seconds` altogether (and a moment to kill)."""
    deadline = time.monotonic() + grace_seconds
    for child in children:
        await child.stop(max(0.1, deadline - time.monotonic()))
