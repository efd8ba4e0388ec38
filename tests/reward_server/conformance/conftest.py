from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import pytest

from tests.support.processes import ROOT


@dataclass(frozen=True)
class Ended:
    """How a run of the kit ended."""

    code: int
    out: str
    err: str


Kit = Callable[..., Awaitable[Ended]]


@pytest.fixture
def kit() -> Kit:
    """`ended = await kit(address, "--run", …)`: the kit as a process of its own."""

    async def run(*arguments: str) -> Ended:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "reward_server.conformance", *arguments),
            cwd=ROOT,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            out, err = await asyncio.wait_for(process.communicate(), 120)
        except BaseException:
            process.kill()
            await process.wait()
            raise
        assert process.returncode is not None
        return Ended(process.returncode, out.decode(), err.decode())

    return run
