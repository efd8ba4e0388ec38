"""What a well-behaved client notices of hostile ones: its p99, quiet and under each attack, in turn."""

from __future__ import annotations

import asyncio
import itertools
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.channel import open_channel
from rlhf.reward.v1 import reward_pb2, reward_pb2_grpc
from rlhf.security.config import ClientSecurity
from tests.benchmarks.attacks import ATTACKS
from tests.benchmarks.measuring import Measurement, percentile
from tests.support.processes import ROOT, StartProcess

_TOKEN, _OTHER_TOKEN = "the-token-of-the-good-one", "the-token-of-the-hostile-one"
_BEGIN_SECONDS = 1.0


@dataclass(frozen=True)
class Work:
    """How much is measured: `calls` one after the other in each of `rounds`, for each attack and without one."""

    calls: int = 500
    rounds: int = 5


async def measure(folder: Path, start: StartProcess, threads: int, work: Work | None = None) -> Measurement:
    """Interleaved: each round measures a quiet server and one under each attack."""
    work = work or Work()
    _write_access_file(folder)
    server = start(
        "reward_server",
        *("--reward", "length", "--reward-options", "{target: 4}", "--access-file", str(folder / "access.yaml")),
        *("--max-message-bytes", str(4 << 20), "--receive-seconds", "3"),
    )
    server.wait_serving("rlhf.reward.v1.RewardService")
    milliseconds: dict[str, list[float]] = {"quiet": [], **{kind: [] for kind in ATTACKS}}
    numbers = itertools.count()
    async with open_channel(server.address, security=ClientSecurity(token_file=folder / "good.token")) as channel:
        stub: Any = reward_pb2_grpc.RewardServiceStub(channel)
        for _ in range(work.rounds):
            for kind, p99s in milliseconds.items():
                with _attacked(server.address, kind):
                    await asyncio.sleep(_BEGIN_SECONDS)
                    seconds = [await _call(stub, next(numbers)) for _ in range(work.calls)]
                p99s.append(percentile(seconds, 0.99) * 1e3)
    return Measurement("p99 of a well-behaved client's Score beside hostile ones", "ms", milliseconds)


def _write_access_file(folder: Path) -> None:
    tokens = {"good": _TOKEN, "hostile": _OTHER_TOKEN}
    for name, token in tokens.items():
        (folder / f"{name}.token").write_text(token)
    entries = [f"{name}: {{roles: [scorer], token_file: {name}.token}}" for name in tokens]
    (folder / "access.yaml").write_text("\n".join(entries))


async def _call(stub: Any, number: int) -> float:
    sample = reward_pb2.Sample(sample_id=str(number), group_id=str(number), group_size=1, completion="four")
    began = time.perf_counter()
    await stub.Score(reward_pb2.ScoreRequest(run_id="run", samples=[sample]), timeout=30)
    return time.perf_counter() - began


@contextmanager
def _attacked(address: str, kind: str) -> Iterator[None]:
    if kind not in ATTACKS:
        yield
        return
    attacker = subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.attacks", address, kind, _OTHER_TOKEN], cwd=ROOT
    )
    try:
        yield
    finally:
        attacker.kill()
        attacker.wait()
