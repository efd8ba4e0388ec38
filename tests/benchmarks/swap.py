"""New weights on a serving server: bytes per second by the way they take, and how long decoding stands still."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf.channel import open_channel
from rlhf.policy.v1 import policy_pb2, policy_pb2_grpc
from rlhf.tensors import dtype_name
from rlhf.weights.v1 import weights_pb2, weights_pb2_grpc
from tests.benchmarks.measuring import Measurement, interleaved
from tests.support.processes import ProcessUnderTest, StartProcess
from trainer.clients.publisher import WeightPublisher
from trainer.clients.weight_files import WrittenWeights, written
from trainer.versions import WeightsVersion

GB = 1e9
SWAPS, ROWS, TOKENS = 8, 16, 192
_STEPS_BETWEEN = 6
_SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Pauses:
    """Milliseconds: of the swaps, of decode steps between them, and of the longest gap that a reader saw at a swap."""

    swaps: list[float]
    steps: list[float]
    gaps: list[float]

    def show(self) -> None:
        """Print the table."""
        table = Table(title=f"swaps while {ROWS} completions run (KEEP_CACHE), ms")
        for heading in ("", "median", "max"):
            table.add_column(heading, justify="left" if not heading else "right")
        for name, values in (
            ("decode step between swaps", self.steps),
            ("swap: decoding stands still", self.swaps),
            ("longest gap between two tokens at a swap", self.gaps),
        ):
            table.add_row(name, f"{statistics.median(values):.1f}", f"{max(values):.1f}")
        Console().print(table)


@dataclass(frozen=True)
class Swaps:
    """Both tables."""

    rates: Measurement
    pauses: Pauses

    def show(self) -> None:
        """Print them."""
        self.rates.show()
        self.pauses.show()


async def measure(folder: Path, start: StartProcess, threads: int) -> Swaps:
    """All over one server, the folder in shared memory where there is some."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tensors = [(name, parameter.detach()) for name, parameter in model.named_parameters()]
    with _shared_folder(folder) as root:
        flags = ("--model", str(folder), "--threads", str(threads), "--managed", "--weights-root", str(root))
        server = start("policy_server", *flags)
        server.wait_serving("rlhf.weights.v1.WeightsService")
        async with written(root, "benchmark", tensors) as files, open_channel(server.address) as channel:
            standing = _StandingFile(channel, tensors, files)
            return Swaps(await _rates(server, tensors, root, standing), await _pauses(server, channel, standing))


class _StandingFile:
    """Updates from a file that is there already. `next_version` is for all updates of the server."""

    def __init__(self, channel: grpc.aio.Channel, tensors: Sequence[tuple[str, Tensor]], files: WrittenWeights) -> None:
        self._stub: Any = weights_pb2_grpc.WeightsServiceStub(channel)  # type: ignore[no-untyped-call]
        self._folder = files.folder
        self._size = sum(tensor.nbytes for _, tensor in tensors)
        self._manifest = weights_pb2.Manifest(
            tensors=[
                weights_pb2.TensorSpec(name=name, dtype=dtype_name(tensor.dtype), shape=tensor.shape, xxh3_64=digest)
                for (name, tensor), digest in zip(tensors, files.digests, strict=True)
            ]
        )
        self._last = 0

    def next_version(self) -> WeightsVersion:
        self._last += 1
        return WeightsVersion("benchmark", 1, self._last)

    async def update(self) -> None:
        await self._stub.UpdateWeights(self._messages(), timeout=60)

    async def _messages(self) -> AsyncIterator[weights_pb2.UpdateWeightsRequest]:
        version = self.next_version()
        begin = weights_pb2.Begin(
            update_id=str(version),
            weights=version.to_proto(),
            directory=weights_pb2.DirectorySource(path=self._folder),
            total_bytes=self._size,
            in_flight=weights_pb2.IN_FLIGHT_KEEP_CACHE,
        )
        if self._last == 1:
            begin.if_current.SetInParent()
        yield weights_pb2.UpdateWeightsRequest(begin=begin)
        yield weights_pb2.UpdateWeightsRequest(manifest=self._manifest)
        yield weights_pb2.UpdateWeightsRequest(commit=weights_pb2.Commit())


@contextmanager
def _shared_folder(scratch: Path) -> Iterator[Path]:
    parent = _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else scratch.parent
    root = parent / f"rlhf-benchmark-{time.time_ns()}"
    root.mkdir()
    try:
        yield root
    finally:
        root.rmdir()


async def _rates(
    server: ProcessUnderTest, tensors: Sequence[tuple[str, Tensor]], root: Path, standing: _StandingFile
) -> Measurement:
    size = sum(tensor.nbytes for _, tensor in tensors)
    streaming, through_files = WeightPublisher(server.address), WeightPublisher(server.address, shared_folder=root)
    copies = [torch.empty_like(tensor) for _, tensor in tensors]

    async def copy() -> float:
        for target, (_, tensor) in zip(copies, tensors, strict=True):
            target.copy_(tensor)
        return size / GB

    async def stream() -> float:
        await streaming.publish(tensors, standing.next_version())
        return size / GB

    async def file() -> float:
        await through_files.publish(tensors, standing.next_version())
        return size / GB

    async def standing_file() -> float:
        await standing.update()
        return size / GB

    try:
        return await interleaved(
            f"weights: {size / 1e6:,.0f} MB of fp32",
            "GB/s",
            {
                "copy in memory": copy,
                "stream over loopback": stream,
                "file in shared memory, writing included": file,
                "file in shared memory that is there": standing_file,
            },
            rest=1.0,  # a server on a CPU packs the weights once it has answered
        )
    finally:
        await streaming.close()
        await through_files.close()


async def _pauses(server: ProcessUnderTest, channel: grpc.aio.Channel, standing: _StandingFile) -> Pauses:
    stub: Any = policy_pb2_grpc.PolicyServiceStub(channel)  # type: ignore[no-untyped-call]
    arrivals: list[float] = []
    arrived = asyncio.Event()

    async def read(row: int) -> None:
        request = policy_pb2.StreamGenerateRequest(
            request=policy_pb2.GenerateRequest(
                prompt=policy_pb2.Prompt(token_ids=policy_pb2.TokenIds(ids=range(16))),
                sampling=policy_pb2.SamplingParams(max_new_tokens=TOKENS, min_new_tokens=TOKENS, seed=row),
            )
        )
        async for _ in stub.StreamGenerate(request, timeout=600):
            if row == 0:
                arrivals.append(time.perf_counter())
                arrived.set()

    async def steps(count: int) -> None:
        before = len(arrivals)
        while len(arrivals) < before + count:
            arrived.clear()
            await arrived.wait()

    swaps: list[float] = []
    spans: list[tuple[float, float]] = []
    readers = [asyncio.create_task(read(row)) for row in range(ROWS)]
    for _ in range(SWAPS):
        await steps(_STEPS_BETWEEN)
        before, began = _swap_seconds(server), time.perf_counter()
        await standing.update()
        spans.append((began, time.perf_counter()))
        swaps.append(_swap_seconds(server) - before)
    await asyncio.gather(*readers)
    gaps = list(itertools.pairwise(arrivals))
    at_swaps = [max((b - a for a, b in gaps if a < end and b > began), default=0.0) for began, end in spans]
    between = [b - a for a, b in gaps if all(b < began or a > end for began, end in spans)]
    return Pauses(*([1e3 * value for value in values] for values in (swaps, between, at_swaps)))


def _swap_seconds(server: ProcessUnderTest) -> float:
    with urllib.request.urlopen(server.metrics_url, timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("rlhf_policy_weights_swap_seconds_sum"))
