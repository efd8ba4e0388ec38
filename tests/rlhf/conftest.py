from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from prometheus_client import CollectorRegistry

from rlhf.channel import open_channel
from rlhf.server import Server
from tests.support.scripted_server import SERVICE, ScriptedServicer, Stub


@dataclass
class Served:
    server: Server
    servicer: ScriptedServicer
    channel: grpc.aio.Channel
    stub: Stub
    registry: CollectorRegistry

    def sample(self, metric: str, method: str, **labels: str) -> float | None:
        """The value of a metric for one method of the scripted service."""
        for family in self.registry.collect():
            for sample in family.samples:
                wanted = {"grpc_service": SERVICE, "grpc_method": method, **labels}
                if sample.name == metric and wanted.items() <= sample.labels.items():
                    return sample.value
        return None


Serve = Callable[..., AbstractAsyncContextManager[Served]]


@pytest.fixture
def serve() -> Serve:
    """`async with serve(failures={name: make}, listen=…) as served`: a scripted server in this process."""

    @contextlib.asynccontextmanager
    async def serving(
        failures: dict[str, Callable[[], Exception]] | None = None, **overrides: Any
    ) -> AsyncIterator[Served]:
        registry = CollectorRegistry()
        settings: dict[str, Any] = {
            "listen": "127.0.0.1:0",
            "metrics_port": 0,
            "max_message_bytes": 8 << 20,
            "drain_seconds": 0,
            "grace_seconds": 5,
            "registry": registry,
            **overrides,
        }
        server = Server("scripted server", **settings)
        servicer = ScriptedServicer(failures)
        servicer.add_to(server.grpc)
        server.register(SERVICE, serving=True)
        await server.start()
        try:
            async with open_channel(server.address) as channel:
                yield Served(server, servicer, channel, Stub(channel), registry)
        finally:
            await server.stop()

    return serving


async def failure_of(call: Any) -> grpc.aio.AioRpcError:
    """The error that a call fails with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await result_of(call)
    return caught.value


async def result_of(call: Any) -> Any:
    """The answer of a call, or all of them."""
    return [message async for message in call] if hasattr(call, "__aiter__") else await call
