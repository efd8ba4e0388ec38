"""A real server whose methods do what their request says; also a process: python -m tests.support.scripted_server.

Messages are JSON: {"raise": name of a failure below}, {"wait_seconds": s}, {"answers": n}; anything is echoed.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from pydantic_settings import SettingsConfigDict

from rlhf.config import load_settings
from rlhf.failures import RpcFailure
from rlhf.logs import configure_logging, get_logger
from rlhf.security.settings import SecuredServerSettings
from rlhf.server import Server

SERVICE = "test.Scripted"

_log = get_logger(__name__)


class ScriptedServicer:
    """All four kinds of RPC; keeps what it was asked, and how the handlers that did not finish ended."""

    def __init__(self, failures: dict[str, Callable[[], Exception]] | None = None) -> None:
        self.requests: list[dict[str, Any]] = []
        self.cut: list[str] = []
        self.began = asyncio.Event()
        self._failures = failures or {}

    def add_to(self, server: grpc.aio.Server) -> None:
        """Serve under SERVICE."""
        codec: dict[str, Any] = {"request_deserializer": json.loads, "response_serializer": _encode}
        methods = {
            "UnaryUnary": grpc.unary_unary_rpc_method_handler(self.unary_unary, **codec),
            "UnaryStream": grpc.unary_stream_rpc_method_handler(self.unary_stream, **codec),
            "StreamUnary": grpc.stream_unary_rpc_method_handler(self.stream_unary, **codec),
            "StreamStream": grpc.stream_stream_rpc_method_handler(self.stream_stream, **codec),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))

    async def unary_unary(self, request: dict[str, Any], context: Any) -> dict[str, Any]:
        await self._act(request, context)
        return request

    async def unary_stream(self, request: dict[str, Any], context: Any) -> AsyncIterator[dict[str, Any]]:
        for index in range(request.get("answers", 0)):
            yield {"index": index}
        await self._act(request, context)

    async def stream_unary(self, requests: AsyncIterator[dict[str, Any]], context: Any) -> dict[str, Any]:
        count = 0
        async for request in requests:
            count += 1
            await self._act(request, context)
        return {"count": count}

    async def stream_stream(
        self, requests: AsyncIterator[dict[str, Any]], context: Any
    ) -> AsyncIterator[dict[str, Any]]:
        async for request in requests:
            await self._act(request, context)
            yield request

    async def _act(self, request: dict[str, Any], context: Any) -> None:
        self.requests.append(request)
        self.began.set()
        _log.info("acting", script=request.get("script"))
        try:
            await asyncio.sleep(request.get("wait_seconds", 0))
        except BaseException as error:
            self.cut.append(type(error).__name__)
            raise
        if "abort" in request:
            await context.abort(grpc.StatusCode[request["abort"]], "aborted by the handler itself")
        if "raise" in request:
            raise self._failures[request["raise"]]()


def _encode(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode()


class Stub:
    """Calls to a ScriptedServicer."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        codec: dict[str, Any] = {"request_serializer": _encode, "response_deserializer": json.loads}
        self.unary_unary = channel.unary_unary(f"/{SERVICE}/UnaryUnary", **codec)
        self.unary_stream = channel.unary_stream(f"/{SERVICE}/UnaryStream", **codec)
        self.stream_unary = channel.stream_unary(f"/{SERVICE}/StreamUnary", **codec)
        self.stream_stream = channel.stream_stream(f"/{SERVICE}/StreamStream", **codec)


class ScriptedSettings(SecuredServerSettings):
    """What a process of it can be told."""

    model_config = SettingsConfigDict(env_prefix="RLHF_SCRIPTED_")


async def _serve(settings: ScriptedSettings) -> None:
    server = Server.of("scripted server", settings)
    ScriptedServicer({"failure": lambda: RpcFailure(grpc.StatusCode.ABORTED, "as scripted")}).add_to(server.grpc)
    server.register(SERVICE, serving=True)
    await server.start()
    await server.run_until_signalled()


if __name__ == "__main__":
    loaded = load_settings(ScriptedSettings, prog="python -m tests.support.scripted_server")
    configure_logging(loaded.log_format, loaded.log_level)
    asyncio.run(_serve(loaded))
