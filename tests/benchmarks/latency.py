"""How long readers of a stream wait: requests arrive at random at rising rates, alone and beside a bulk of rollouts."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from rich.console import Console

from rlhf.channel import open_channel
from rlhf.policy.v1 import policy_pb2, policy_pb2_grpc
from tests.benchmarks.measuring import make_table, percentile
from tests.benchmarks.roofline import Limits
from tests.support.processes import StartProcess
from trainer.clients.policy import PolicyClient

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.figure import Figure

ALONE, BESIDE, AS_BULK = "alone", "beside rollouts", "beside rollouts, sent as bulk"
_DEADLINE = 120.0


@dataclass(frozen=True)
class Work:
    """What arrives, and the objective that a request meets or not.

    loads: shares of the rate at which the server answers when it always has enough to do. seconds: of arrivals at each
    load. rollouts: bulk calls in flight. queue: the server's max_queue_requests. first, gap: seconds to a request's
    first token, and between two tokens at its 99th percentile.
    """

    prompt_tokens: int = 16
    shortest: int = 8
    longest: int = 128
    loads: tuple[float, ...] = (0.25, 0.5, 0.75, 0.9, 1.1, 1.5)
    seconds: float = 8.0
    rollouts: int = 96
    queue: int = 192
    first: float = 1.0
    gap: float = 0.2
    engine: str = "own"


@dataclass(frozen=True)
class Answer:
    """One request. Seconds; `first` counts from when the request was due, None = it was rejected."""

    first: float | None
    gaps: list[float]

    def meets(self, work: Work) -> bool:
        """Whether its reader was served as the objective says."""
        on_time = self.first is not None and self.first <= work.first
        return on_time and (not self.gaps or percentile(self.gaps, 0.99) <= work.gap)


@dataclass(frozen=True)
class Phase:
    """What became of the requests of one load. rate: of them in a second; rollout_rate: tokens/s of the rollouts."""

    condition: str
    load: float
    rate: float
    answers: list[Answer]
    rollout_rate: float

    def firsts(self, share: float) -> float:
        """Seconds to the first token that `share` of the accepted requests waited at most."""
        return percentile([answer.first for answer in self.answers if answer.first is not None], share)

    def gaps(self, share: float) -> float:
        """Seconds between two tokens that `share` of all such gaps lasted at most."""
        return percentile([gap for answer in self.answers for gap in answer.gaps], share)

    @property
    def rejected(self) -> int:
        """Requests that were answered RESOURCE_EXHAUSTED."""
        return sum(answer.first is None for answer in self.answers)


@dataclass(frozen=True)
class Latencies:
    """All phases; `capacity` in requests/s."""

    work: Work
    capacity: float
    phases: list[Phase] = field(default_factory=list)

    def goodput(self, phase: Phase) -> float:
        """Requests that met the objective, per second of arrivals."""
        return sum(answer.meets(self.work) for answer in phase.answers) / self.work.seconds

    def show(self) -> None:
        """Print the table."""
        work = self.work
        table = make_table(
            f"latency: {work.shortest}..{work.longest} tokens streamed, engine {work.engine}; load 1 = "
            f"{self.capacity:.1f} requests/s; good = first token in {work.first:g} s, then {work.gap:g} s at p99",
            *("", "load", "requests/s", "good/s", "rejected"),
            *("first token p50 ms", "p99", "between tokens p50 ms", "p99", "rollouts tokens/s"),
        )
        for phase in sorted(self.phases, key=lambda phase: (_CONDITIONS.index(phase.condition), phase.load)):
            times = (phase.firsts(0.5), phase.firsts(0.99), phase.gaps(0.5), phase.gaps(0.99))
            table.add_row(
                phase.condition,
                f"{phase.load:g}",
                f"{phase.rate:.1f}",
                f"{self.goodput(phase):.1f}",
                f"{phase.rejected / max(len(phase.answers), 1):.0%}",
                *(f"{1e3 * seconds:,.0f}" for seconds in times),
                f"{phase.rollout_rate:,.0f}",
            )
        Console(width=160).print(table)

    def record(self) -> dict[str, Any]:
        """See Report."""
        phases = [
            {
                **asdict(phase),
                "goodput": self.goodput(phase),
                "rejected": phase.rejected,
                **{f"first_p{share}": phase.firsts(share / 100) for share in (50, 99)},
                **{f"gap_p{share}": phase.gaps(share / 100) for share in (50, 99)},
            }
            for phase in self.phases
        ]
        return {"settings": asdict(self.work), "capacity": self.capacity, "phases": phases}

    def draw(self, figure: Figure) -> None:
        """See Report."""
        first, gap, good = figure.subplots(1, 3)
        for color, condition in zip(("C0", "C1", "C2"), _CONDITIONS, strict=True):
            phases = sorted((each for each in self.phases if each.condition == condition), key=lambda each: each.load)
            loads = [phase.load for phase in phases]
            for share, style in ((0.5, "--"), (0.99, "-")):
                look = {"color": color, "linestyle": style, "marker": ".", "label": f"{condition}, p{share * 100:.0f}"}
                first.plot(loads, [phase.firsts(share) for phase in phases], **look)
                gap.plot(loads, [phase.gaps(share) for phase in phases], **look)
            good.plot(loads, [self.goodput(phase) for phase in phases], color=color, marker=".")
        first.set(title="To the first token", ylabel="s", yscale="log")
        gap.set(title="Between two tokens", ylabel="s", yscale="log")
        good.set(title="Requests/s that met the objective")
        for axes in (first, gap, good):
            axes.set_xlabel(f"load (1 = {self.capacity:.1f} requests/s)")
            axes.grid(alpha=0.3)
        figure.legend(*first.get_legend_handles_labels(), loc="outside lower center", ncols=3)

    def reached(self, limits: Limits) -> Mapping[str, float]:
        """See Report."""
        return {}


_CONDITIONS = (ALONE, BESIDE, AS_BULK)


async def measure(folder: Path, start: StartProcess, threads: int, work: Work | None = None) -> Latencies:
    """Client and server share the cores. The same requests arrive at the same times under every condition."""
    work = work or Work()
    flags = ("--model", str(folder), "--threads", str(threads), "--engine", work.engine)
    server = start("policy_server", *flags, "--max-queue-requests", str(work.queue))
    server.wait_serving("rlhf.policy.v1.PolicyService")
    async with open_channel(server.address) as channel:
        readers = _Readers(channel, work)
        await readers.saturated(work.seconds / 4)  # warm-up
        result = Latencies(work, await readers.saturated(work.seconds))
        for load, condition in itertools.product(work.loads, _CONDITIONS):
            bulk = _Rollouts(server.address, work)
            async with bulk.running(0 if condition == ALONE else work.rollouts):
                priority = policy_pb2.PRIORITY_BULK if condition == AS_BULK else policy_pb2.PRIORITY_INTERACTIVE
                began, before = time.perf_counter(), bulk.tokens
                answers = await readers.arriving(load * result.capacity, seed=round(1000 * load), priority=priority)
                if condition != ALONE:
                    await bulk.beyond(before)
                rollout_rate = (bulk.tokens - before) / (time.perf_counter() - began)
            result.phases.append(Phase(condition, load, len(answers) / work.seconds, answers, rollout_rate))
    return result


class _Readers:
    """Each reads one stream."""

    def __init__(self, channel: grpc.aio.Channel, work: Work) -> None:
        self._stub: Any = policy_pb2_grpc.PolicyServiceStub(channel)  # type: ignore[no-untyped-call]
        self._work = work

    async def saturated(self, seconds: float, readers: int = 64) -> float:
        """Requests/s that end while as many readers as a batch has rows always want one.

        For so many seconds, or until a first one has ended: a rate of zero would be no scale for the loads.
        """
        ended = 0
        numbers = itertools.count()
        began = time.perf_counter()
        until = began + seconds

        async def read_on() -> None:
            nonlocal ended, until
            while time.perf_counter() < until:
                await self._read(random.Random(next(numbers)), policy_pb2.PRIORITY_INTERACTIVE, time.perf_counter())
                now = time.perf_counter()
                if not ended:
                    until = max(until, now)
                ended += now <= until

        await asyncio.gather(*(read_on() for _ in range(readers)))
        return ended / (until - began)

    async def arriving(self, rate: float, *, seed: int, priority: policy_pb2.Priority) -> list[Answer]:
        """A Poisson process of `rate` requests/s; returns when the work's seconds are over and the last has ended."""
        chance = random.Random(seed)
        due = list(itertools.takewhile(lambda at: at < self._work.seconds, _arrivals(chance, rate)))
        began = time.perf_counter()
        reading = []
        for row, at in enumerate(due):
            await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
            reading.append(asyncio.create_task(self._read(random.Random(f"{seed} {row}"), priority, began + at)))
        await asyncio.sleep(max(0.0, began + self._work.seconds - time.perf_counter()))
        return await asyncio.gather(*reading)

    async def _read(self, chance: random.Random, priority: policy_pb2.Priority, due: float) -> Answer:
        request = policy_pb2.StreamGenerateRequest(request=_request(chance, self._work, priority))
        times: list[float] = []
        try:
            async for message in self._stub.StreamGenerate(request, timeout=_DEADLINE):
                if message.delta.token_ids:
                    times.append(time.perf_counter())
        except grpc.aio.AioRpcError as error:
            if error.code() != grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise
            return Answer(None, [])
        return Answer(times[0] - due, [after - before for before, after in itertools.pairwise(times)])


class _Rollouts:
    """As a trainer makes them: so many calls of bulk priority at any time."""

    def __init__(self, address: str, work: Work) -> None:
        self._address = address
        self._work = work
        self._ended = asyncio.Event()
        self.tokens = 0

    async def beyond(self, tokens: int) -> None:
        """Until a call has ended since there were so many tokens: on a busy machine none may while requests arrive."""
        while self.tokens <= tokens:
            self._ended.clear()
            await self._ended.wait()

    @asynccontextmanager
    async def running(self, calls: int) -> AsyncIterator[None]:
        """While the block runs, which begins once a first one has ended: the batch is full then."""
        client = PolicyClient(self._address)

        async def roll_out(row: int) -> None:
            chance = random.Random(f"rollout {row}")
            while True:
                prompt, length = _prompt(chance, self._work), _length(chance, self._work)
                (completion,) = await client.generate(prompt, seed=row, max_new_tokens=length, min_new_tokens=length)
                self.tokens += len(completion.token_ids)
                self._ended.set()

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(roll_out(row)) for row in range(calls)]
                if tasks:
                    await self.beyond(0)
                yield
                for task in tasks:
                    task.cancel()
        finally:
            await client.close()


def _arrivals(chance: random.Random, rate: float) -> itertools.accumulate[float]:
    return itertools.accumulate(iter(lambda: chance.expovariate(rate), None))


def _request(chance: random.Random, work: Work, priority: policy_pb2.Priority) -> policy_pb2.GenerateRequest:
    prompt, length = _prompt(chance, work), _length(chance, work)
    return policy_pb2.GenerateRequest(
        prompt=policy_pb2.Prompt(token_ids=policy_pb2.TokenIds(ids=prompt)),
        sampling=policy_pb2.SamplingParams(max_new_tokens=length, min_new_tokens=length, seed=chance.getrandbits(32)),
        priority=priority,
    )


def _prompt(chance: random.Random, work: Work) -> Sequence[int]:
    return [chance.randrange(256) for _ in range(work.prompt_tokens)]


def _length(chance: random.Random, work: Work) -> int:
    return round(work.shortest * (work.longest / work.shortest) ** chance.random())
