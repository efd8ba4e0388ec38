"""Score calls: what a reward server costs in Python, Go and Rust, beside a bare echo of the same message.

Latency is taken with one call at a time, throughput with several; client and server share the cores.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from rich.console import Console

from rlhf.reward.v1 import reward_pb2
from tests.benchmarks.echo_server import METHOD as ECHO
from tests.benchmarks.measuring import Measurement, make_table, percentile
from tests.benchmarks.roofline import Limits
from tests.reward_server.examples.servers import EXAMPLES, ExampleServer
from tests.support.processes import ROOT, StartProcess, wait_for

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SAMPLES, IN_FLIGHT = 64, 8
SCORE = "/rlhf.reward.v1.RewardService/Score"


@dataclass(frozen=True)
class Work:
    """Calls made together in each round, half as many alone; examples: languages whose example servers are called."""

    calls: int = 400
    rounds: int = 5
    examples: tuple[str, ...] = ("python", "go", "rust")


@dataclass(frozen=True)
class Timing:
    """Seconds of each call made alone, and calls per second of each round of calls made together."""

    alone: list[float]
    rates: list[float]

    def percentile(self, share: float) -> float:
        """Seconds that `share` of the calls made alone took at most."""
        return percentile(self.alone, share)


@dataclass(frozen=True)
class ScoreTimings:
    """By server; the first is the echo."""

    work: Work
    timings: Mapping[str, Timing]

    def microseconds_per_sample(self, name: str) -> float:
        """What a sample costs in the median call beyond the echo of the same message."""
        echo = next(iter(self.timings.values()))
        return (self.timings[name].percentile(0.5) - echo.percentile(0.5)) / SAMPLES * 1e6

    def show(self) -> None:
        """Print the table."""
        table = make_table(
            f"Score: {SAMPLES} samples a call; latency alone, rates with {IN_FLIGHT} in flight",
            *("", "p50 ms", "p99 ms", "calls/s", "samples/s", "µs a sample beyond the echo"),
        )
        for name, timing in self.timings.items():
            rate = statistics.median(timing.rates)
            table.add_row(
                name,
                f"{timing.percentile(0.5) * 1e3:.2f}",
                f"{timing.percentile(0.99) * 1e3:.2f}",
                f"{rate:,.0f}",
                f"{rate * SAMPLES:,.0f}",
                f"{self.microseconds_per_sample(name):.1f}",
            )
        Console().print(table)

    def record(self) -> dict[str, Any]:
        """See Report."""
        servers = {
            name: {
                "seconds_alone": timing.alone,
                "calls_per_second": timing.rates,
                "p50": timing.percentile(0.5),
                "p99": timing.percentile(0.99),
                "microseconds_per_sample": self.microseconds_per_sample(name),
            }
            for name, timing in self.timings.items()
        }
        return {"settings": asdict(self.work), "servers": servers}

    def draw(self, figure: Figure) -> None:
        """See Report."""
        rates = {name: [SAMPLES * rate for rate in timing.rates] for name, timing in self.timings.items()}
        Measurement(f"Score, {IN_FLIGHT} calls in flight", "samples/s", rates).draw(figure)

    def reached(self, limits: Limits) -> Mapping[str, float]:
        """See Report."""
        return {}


class _Caller:
    """Calls one server with samples that it has never seen."""

    def __init__(self, channel: grpc.aio.Channel, method: str) -> None:
        self._call: Any = channel.unary_unary(method, request_serializer=_serialised)
        self._runs = itertools.count()

    async def once(self) -> float:
        request = _request()
        # A run of its own each time: a repeat would be answered from memory.
        request.run_id = f"run-{next(self._runs)}"
        began = time.perf_counter()
        await self._call(request, timeout=30)
        return time.perf_counter() - began

    async def together(self, calls: int) -> float:
        """Calls per second, IN_FLIGHT of them at any time."""
        left = iter(range(calls))

        async def worker() -> None:
            for _ in left:
                await self.once()

        began = time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(IN_FLIGHT)))
        return calls / (time.perf_counter() - began)


async def measure(folder: Path, start: StartProcess, threads: int, work: Work | None = None) -> ScoreTimings:
    """Interleaved: each round makes the calls of every server."""
    work = work or Work()
    async with AsyncExitStack() as stack:
        callers: dict[str, _Caller] = {}

        async def add(name: str, address: str, method: str = SCORE) -> None:
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(address))
            callers[name] = _Caller(channel, method)

        await add("bare grpc.aio echo", stack.enter_context(_echo_server(folder)), ECHO)
        server = start("reward_server", "--reward", "length", "--reward-options", "{target: 200, unit: characters}")
        server.wait_serving("rlhf.reward.v1.RewardService")
        await add("reward_server, function kind", server.address)
        for language in work.examples:
            example = ExampleServer(EXAMPLES[language], folder / language, "127.0.0.1:0")
            stack.callback(example.kill)
            example.wait_bound()
            await add(f"example in {language}", example.address)
        return ScoreTimings(work, await _timings(callers, work))


async def _timings(callers: Mapping[str, _Caller], work: Work) -> dict[str, Timing]:
    timings = {name: Timing([], []) for name in callers}
    for caller in callers.values():
        await caller.together(max(work.calls // 4, 1))
    for _ in range(work.rounds):
        for name, caller in callers.items():
            timings[name].alone.extend([await caller.once() for _ in range(max(work.calls // 2, 1))])
            timings[name].rates.append(await caller.together(work.calls))
    return timings


@contextmanager
def _echo_server(folder: Path) -> Iterator[str]:
    port_file = folder / "echo-port"
    process = subprocess.Popen([sys.executable, "-m", "tests.benchmarks.echo_server", str(port_file)], cwd=ROOT)
    try:
        wait_for(port_file.exists, within=30, what="port of the echo server")
        yield f"127.0.0.1:{port_file.read_text()}"
    finally:
        process.kill()
        process.wait()


def _request() -> reward_pb2.ScoreRequest:
    """A micro-batch like the trainer's: about 650 bytes a sample."""
    return reward_pb2.ScoreRequest.FromString(_TEMPLATE)


_TEMPLATE = reward_pb2.ScoreRequest(
    samples=[
        reward_pb2.Sample(
            sample_id=f"step-12/row-{row}/{'0123456789abcdef' * 2}",
            group_id=f"step-12/row-{row}",
            group_size=1,
            prompt="The film is a slow and tender look at",
            completion="a family that has more to say than time to say it in . " * 8,
            finish_reason=reward_pb2.FINISH_REASON_EOS,
            metadata={"answer": "a quiet triumph", "row": str(row)},
        )
        for row in range(SAMPLES)
    ]
).SerializeToString()

_serialised: Callable[[reward_pb2.ScoreRequest], bytes] = reward_pb2.ScoreRequest.SerializeToString
