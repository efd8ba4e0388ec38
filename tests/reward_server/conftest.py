from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack
from typing import Any

import grpc
import pytest
from prometheus_client import CollectorRegistry

from reward_server.kinds import Limits
from reward_server.kinds.function import FunctionReward
from reward_server.kinds.loading import load_function
from reward_server.scheduler import Scheduler
from reward_server.service import SERVICE_NAME, RewardService
from rlhf.channel import open_channel
from rlhf.reward.v1 import reward_pb2, reward_pb2_grpc
from rlhf.server import Server
from tests.reward_server import example_rewards

EXAMPLES = "tests.reward_server.example_rewards"

Serve = Callable[..., Awaitable[Any]]


def sample(sample_id: str, completion: str = "good", **fields: Any) -> reward_pb2.Sample:
    fields.setdefault("group_id", "g")
    fields.setdefault("prompt", "It is")
    return reward_pb2.Sample(sample_id=sample_id, completion=completion, **fields)


def request(*samples: reward_pb2.Sample, **fields: Any) -> reward_pb2.ScoreRequest:
    fields.setdefault("run_id", "run")
    return reward_pb2.ScoreRequest(samples=samples, **fields)


async def until(condition: Callable[[], Any], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - what it waits for happens in other threads
            await asyncio.sleep(0.01)


@pytest.fixture(autouse=True)
def _fresh_examples() -> Iterator[None]:
    example_rewards.calls.clear()
    example_rewards.gate.clear()
    example_rewards.async_cancelled.clear()
    yield
    # Worker threads that a test left behind must not wait for ever.
    example_rewards.gate.set()


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """`stub = await serve("lengths", …)`: a server with that reward on a real socket, and a client of it."""
    async with AsyncExitStack() as stack:

        async def start(
            reward: str,
            options: Mapping[str, Any] | None = None,
            *,
            threads: int = 1,
            batch_size: int = 64,
            max_samples: int = 256,
            max_concurrent_calls: int = 8,
            max_queue_samples: int = 4096,
            remember_samples: int = 1000,
            max_message_bytes: int = 4 << 20,
        ) -> Any:
            spec = reward if reward in ("vader", "length", "regex") else f"{EXAMPLES}:{reward}"
            limits = Limits(
                batch_size=batch_size,
                max_queue_samples=max_queue_samples,
                remember_samples=remember_samples,
                threads=threads,
                concurrency=max_concurrent_calls,
            )
            kind = FunctionReward(load_function(spec, options or {}), limits)
            service = RewardService(
                max_samples=max_samples,
                max_request_bytes=max_message_bytes,
                max_concurrent_calls=max_concurrent_calls,
            )
            service.open(kind.description, Scheduler(kind, limits))
            server = Server(
                "reward_server",
                listen="127.0.0.1:0",
                metrics_port=0,
                max_message_bytes=max_message_bytes,
                drain_seconds=0,
                grace_seconds=0,
                registry=CollectorRegistry(),
            )
            reward_pb2_grpc.add_RewardServiceServicer_to_server(service, server.grpc)
            server.register(SERVICE_NAME, serving=True)
            await server.start()
            stack.push_async_callback(server.stop)
            channel: grpc.aio.Channel = await stack.enter_async_context(open_channel(server.address))
            return reward_pb2_grpc.RewardServiceStub(channel)

        yield start
