"""New weights on a serving server: bytes per second by the way they take, and how long decoding stands still."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf.channel import open_channel
from rlhf.policy.v1 import policy_pb2, policy_pb2_grpc
from rlhf.tensors import dtype_name
from rlhf.weights.v1 import weights_pb2, weights_pb2_grpc
from tests.benchmarks.measuring import Measurement, interleaved, make_table
from tests.benchmarks.roofline import Limits
from tests.support.models import make_tiny_gpt2
from tests.support.processes import ProcessUnderTest, StartProcess
from trainer.clients.publisher import WeightPublisher
from trainer.clients.weight_files import WrittenWeights, written
from trainer.versions import WeightsVersion

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GB = 1e9
_STEPS_BETWEEN = 6
_SHARED_MEMORY = Path("/dev/shm")


_COPY = "copy in memory"


@dataclass(frozen=True)
class Work:
    """Models of these shapes (parameters of make_tiny_gpt2); swaps while `rows` completions of `tokens` run."""

    models: Sequence[Mapping[str, int]] = (
        {"layers": 6, "width": 256},
        {"layers": 8, "width": 512},
        {"layers": 12, "width": 768, "heads": 12, "vocab": 50257},
    )
    swaps: int = 8
    rows: int = 16
    tokens: int = 192
    rounds: int = 5


@dataclass(frozen=True)
class Pauses:
    """Milliseconds: of the swaps, of decode steps between them, and of the longest gap that a reader saw at a swap."""

    swaps: list[float]
    steps: list[float]
    gaps: list[float]

    def rows(self) -> Iterator[tuple[str, list[float]]]:
        """By what they are of."""
        yield "decode step between swaps", self.steps
        yield "swap: decoding stands still", self.swaps
        yield "longest gap between two tokens at a swap", self.gaps


@dataclass(frozen=True)
class Size:
    """What was found for weights of so many bytes."""

    size: int
    rates: Measurement
    pauses: Pauses


@dataclass(frozen=True)
class Swaps:
    """Of every size, the smallest first."""

    work: Work
    sizes: list[Size]

    def show(self) -> None:
        """Print two tables for each size."""
        for each in self.sizes:
            each.rates.show()
            title = f"swaps while {self.work.rows} completions run (KEEP_CACHE), {each.size / 1e6:,.0f} MB, ms"
            table = make_table(title, "", "median", "max")
            for name, values in each.pauses.rows():
                table.add_row(name, f"{statistics.median(values):.1f}", f"{max(values):.1f}")
            Console().print(table)

    def record(self) -> dict[str, Any]:
        """See Report."""
        sizes = [
            {
                "bytes": each.size,
                **each.rates.record(),
                "pauses_ms": asdict(each.pauses),
                "pause_medians_ms": {name: statistics.median(values) for name, values in each.pauses.rows()},
            }
            for each in self.sizes
        ]
        return {"settings": asdict(self.work), "sizes": sizes}

    def draw(self, figure: Figure) -> None:
        """See Report."""
        rates, pauses = figure.subplots(1, 2)
        megabytes = [each.size / 1e6 for each in self.sizes]
        for name in self.sizes[0].rates.rates:
            rates.plot(megabytes, [each.rates.median(name) for each in self.sizes], marker=".", label=name)
        for rows in zip(*(each.pauses.rows() for each in self.sizes), strict=True):
            pauses.plot(megabytes, [statistics.median(values) for _, values in rows], marker=".", label=rows[0][0])
        rates.set(title="Until the weights are live, medians", ylabel="GB/s")
        pauses.set(title="While completions run, medians", ylabel="ms")
        for axes in (rates, pauses):
            axes.set(xlabel="MB of weights", xlim=0, ylim=0)
            axes.grid(alpha=0.3)
            axes.legend(fontsize=7)

    def reached(self, limits: Limits) -> Mapping[str, float]:
        """See Report."""
        largest = self.sizes[-1]
        return {
            f"a copy's rate in memory, {largest.size / 1e6:,.0f} MB: {name}": largest.rates.ratio(name, _COPY)
            for name in largest.rates.rates
            if name != _COPY
        }


async def measure(folder: Path, start: StartProcess, threads: int, work: Work | None = None) -> Swaps:
    """By size, each over one server; the models are made beside `folder`."""
    work = work or Work()
    sizes = []
    for number, shape in enumerate(work.models):
        model = make_tiny_gpt2(folder.parent / f"swapped-{number}", context=256, **shape)
        sizes.append(await _measure(model, start, threads, work))
    return Swaps(work, sizes)


async def _measure(folder: Path, start: StartProcess, threads: int, work: Work) -> Size:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tensors = [(name, parameter.detach()) for name, parameter in model.named_parameters()]
    with _shared_folder(folder) as root:
        flags = ("--model", str(folder), "--threads", str(threads), "--managed", "--weights-root", str(root))
        server = start("policy_server", *flags)
        server.wait_serving("rlhf.weights.v1.WeightsService")
        async with written(root, "benchmark", tensors) as files, open_channel(server.address) as channel:
            standing = _StandingFile(channel, tensors, files)
            rates = await _rates(server, tensors, root, standing, work.rounds)
            pauses = await _pauses(server, channel, standing, work)
        server.kill()
    return Size(sum(tensor.nbytes for _, tensor in tensors), rates, pauses)


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
    server: ProcessUnderTest,
    tensors: Sequence[tuple[str, Tensor]],
    root: Path,
    standing: _StandingFile,
    rounds: int,
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
                _COPY: copy,
                "stream over loopback": stream,
                "file in shared memory, writing included": file,
                "file in shared memory that is there": standing_file,
            },
            rounds=rounds,
            rest=1.0,  # a server on a CPU packs the weights once it has answered
        )
    finally:
        await streaming.close()
        await through_files.close()


async def _pauses(server: ProcessUnderTest, channel: grpc.aio.Channel, standing: _StandingFile, work: Work) -> Pauses:
    stub: Any = policy_pb2_grpc.PolicyServiceStub(channel)  # type: ignore[no-untyped-call]
    arrivals: list[float] = []
    arrived = asyncio.Event()

    async def read(row: int) -> None:
        request = policy_pb2.StreamGenerateRequest(
            request=policy_pb2.GenerateRequest(
                prompt=policy_pb2.Prompt(token_ids=policy_pb2.TokenIds(ids=range(16))),
                sampling=policy_pb2.SamplingParams(max_new_tokens=work.tokens, min_new_tokens=work.tokens, seed=row),
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
    readers = [asyncio.create_task(read(row)) for row in range(work.rows)]
    for _ in range(work.swaps):
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
    lines = server.metrics_text().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("rlhf_policy_weights_swap_seconds_sum"))
