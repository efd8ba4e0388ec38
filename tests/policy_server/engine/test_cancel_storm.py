"""Callers who leave in every way and at every moment: what they held comes back, and those who stay notice nothing."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import gc
import random
from collections.abc import Iterable
from dataclasses import dataclass

import pytest

from policy_server.engine.batch import BatchEngine
from policy_server.engine.generation import Generation, Row
from policy_server.engine.protocol import FinishReason, GenerationRequest, Priority, TokenStream
from rlhf.failures import RpcFailure
from tests.policy_server.engine.architectures import loaded, make_model
from tests.policy_server.engine.harness import Gathered, Watcher, generate, request, running, until
from tests.support.memory import private_bytes

AT_ONCE = 100
ROWS = 16
LENGTH = 12
ALLOWED_GROWTH = 8 << 20
"""Bytes by which the process may grow over the last storm: 8 KiB for each of a thousand requests."""

ALLOWED_TIES = 1
"""Completions of a storm that may differ by rounding: about one token in a million does, in a few thousand."""


some_or_many = pytest.mark.parametrize("count", [250, pytest.param(1000, marks=pytest.mark.slow)], ids=["some", "many"])


class Leave(enum.Enum):
    """How a caller leaves."""

    CLOSE = enum.auto()
    DROP = enum.auto()
    CANCEL_CONSUMER = enum.auto()
    BY_NAME = enum.auto()


@dataclass(frozen=True)
class Caller:
    """leave: None = stays to the end. deltas: how many it takes before it leaves, if there are so many."""

    asked: GenerationRequest
    leave: Leave | None
    deltas: int


def callers(count: int) -> list[Caller]:
    """Half of them leave: a third of these before their first token, some after the end."""
    source = random.Random(5)
    leaves = [*source.choices(list(Leave), k=count // 2), *[None] * (count - count // 2)]
    source.shuffle(leaves)
    return [
        Caller(
            request(
                [source.randrange(256) for _ in range(source.randint(1, 20))],
                name=f"{index}",
                n=source.choice([1, 1, 1, 2, 3]),
                seed=source.getrandbits(64),
                max_new_tokens=LENGTH,
                priority=source.choice(list(Priority)),
                stream_interval=source.choice([1, 1, 5]),
            ),
            leave,
            source.choice([0, source.randint(1, LENGTH), 4 * LENGTH]),
        )
        for index, leave in enumerate(leaves)
    ]


async def leave(engine: BatchEngine, caller: Caller) -> None:
    stream = engine.submit(caller.asked)
    with contextlib.suppress(StopAsyncIteration):
        for _ in range(caller.deltas):
            await anext(stream)
    match caller.leave:
        case Leave.CLOSE:
            await stream.aclose()
        case Leave.CANCEL_CONSUMER:
            consumer = asyncio.create_task(exhaust(stream))
            await asyncio.sleep(0)
            consumer.cancel()
            await asyncio.gather(consumer, return_exceptions=True)
        case Leave.BY_NAME:
            engine.cancel(caller.asked.request_id)
            with contextlib.suppress(RpcFailure):  # unless its last token was on the way already
                await exhaust(stream)
        case Leave.DROP:
            del stream


async def exhaust(stream: TokenStream) -> None:
    async for _ in stream:
        pass


async def storm(engine: BatchEngine, everyone: Iterable[Caller]) -> dict[str, list[Gathered]]:
    """All callers, many at once; returns what those got who stayed."""
    stayed: dict[str, list[Gathered]] = {}
    places = asyncio.Semaphore(AT_ONCE)

    async def one(caller: Caller) -> None:
        async with places:
            if caller.leave is None:
                stayed[caller.asked.request_id] = await generate(engine, caller.asked)
            else:
                await leave(engine, caller)

    await asyncio.gather(*map(one, everyone))
    return stayed


async def check_that_all_came_back(engine: BatchEngine, watcher: Watcher) -> None:
    """Nothing runs or waits, no request is remembered, and every row of the batch is free at once."""
    await until(lambda: watcher.rows == 0 and watcher.waiting == 0)
    assert engine._queue._waiting == 0
    assert not kept_alive(engine)
    steps = len(watcher.decoded_batches)
    async with asyncio.timeout(20):
        completions = await generate(engine, request([1], n=ROWS, max_new_tokens=2, min_new_tokens=2))
    assert watcher.decoded_batches[steps:] == [ROWS]
    assert [each.finish_reason for each in completions] == [FinishReason.LENGTH] * ROWS


def kept_alive(engine: BatchEngine) -> list[Generation | Row]:
    """Requests and completions of this engine; other tests' may hang on what they logged."""
    gc.collect()
    models = engine._models.values()
    return [each for each in gc.get_objects() if type(each) in (Generation, Row) and each.model in models]


def memory() -> int:
    gc.collect()
    return private_bytes()


def differing(stayed: dict[str, list[Gathered]], quiet: dict[str, list[Gathered]]) -> int:
    """How many completions are not those of the quiet engine."""
    assert stayed.keys() == quiet.keys()
    return sum(
        (completion.token_ids, completion.text) != (expected.token_ids, expected.text)
        for name, completions in stayed.items()
        for completion, expected in zip(completions, quiet[name], strict=True)
    )


@some_or_many
async def test_a_storm_of_cancellations_leaves_nothing_behind_and_disturbs_nobody(count: int) -> None:
    everyone = callers(count)
    async with running(loaded(make_model("gpt2"))) as engine:
        quiet = {each.asked.request_id: await generate(engine, each.asked) for each in everyone if each.leave is None}
    watcher = Watcher()
    async with running(loaded(make_model("gpt2")), max_batch_rows=ROWS, observer=watcher) as engine:
        stayed = await storm(engine, everyone)
        await check_that_all_came_back(engine, watcher)
    assert watcher.most_rows == ROWS
    assert watcher.cancelled_completions > count // 4  # some callers leave after the end
    assert differing(stayed, quiet) <= ALLOWED_TIES


@some_or_many
async def test_one_storm_after_another_takes_no_more_memory(count: int) -> None:
    """Without packed weights: oneDNN keeps a kernel of half a MiB for each number of rows, which are many by chance."""
    everyone = callers(count)
    watcher = Watcher()
    sizes = []
    async with running(loaded(make_model("gpt2")), max_batch_rows=ROWS, pack_weights=False, observer=watcher) as engine:
        for _ in range(3):  # the first is for what is made once
            await storm(engine, everyone)
            await check_that_all_came_back(engine, watcher)
            sizes.append(memory())
    assert sizes[2] - sizes[1] < ALLOWED_GROWTH
