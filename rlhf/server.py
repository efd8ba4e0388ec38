"""The life of a gRPC server: bind, announce, serve, drain. Health, reflection and limits are the same for all three."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import REGISTRY, CollectorRegistry

from rlhf import failures
from rlhf.channel import METADATA_KEYS
from rlhf.logs import bound_context, get_logger
from rlhf.metrics import GrpcServerMetrics, MetricsEndpoint, observe, serve_metrics, with_behaviour

log = get_logger(__name__)

MIN_PING_INTERVAL_MS = 10_000
"""Clients ping every 30 s (rlhf/channel.py); a server that allows less than its clients do answers with GOAWAY."""


class BindError(OSError):
    """The address can't be listened on; the message names it."""


class Server:
    """One process's gRPC server and metrics endpoint.

    listen: "host:port", port 0 = the OS picks. max_message_bytes: limit of one message, both ways. drain_seconds: how
    long health says NOT_SERVING before calls are refused. grace_seconds: how long running calls may finish after that.
    endpoint_file: where the bound addresses are written, as JSON {"pid", "address", "metrics_url"}.
    """

    def __init__(
        self,
        name: str,
        *,
        listen: str,
        metrics_port: int | Literal["auto"] = 0,
        metrics_host: str = "127.0.0.1",
        max_message_bytes: int = 64 << 20,
        drain_seconds: float = 0.5,
        grace_seconds: float = 30.0,
        endpoint_file: Path | None = None,
        registry: CollectorRegistry = REGISTRY,
    ) -> None:
        self.name = name
        self.address = ""
        self.metrics_url: str | None = None
        self._listen = listen
        self._metrics_port = metrics_port
        self._metrics_host = metrics_host
        self._drain_seconds = drain_seconds
        self._grace_seconds = grace_seconds
        self._endpoint_file = endpoint_file
        self._registry = registry
        self._metrics: MetricsEndpoint | None = None
        self._on_drain: list[Callable[[], Awaitable[None] | None]] = []
        self._services: list[str] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self.grpc = grpc.aio.server(
            interceptors=[_Interceptor(GrpcServerMetrics(registry))],
            options=[
                ("grpc.max_receive_message_length", max_message_bytes),
                ("grpc.max_send_message_length", max_message_bytes),
                ("grpc.so_reuseport", 0),  # otherwise a second server on the port starts silently
                ("grpc.http2.min_ping_interval_without_data_ms", MIN_PING_INTERVAL_MS),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.keepalive_time_ms", 60_000),
                ("grpc.keepalive_timeout_ms", 20_000),
            ],
        )
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc)
        self._serving: dict[str, bool] = {"": True}

    def register(self, service: str, serving: bool) -> None:
        """Announce a service (its full name) to health and reflection; call before start()."""
        self._services.append(service)
        self._serving[service] = serving

    def set_serving(self, service: str, serving: bool) -> None:
        """Change what health says of a service; takes effect at once, or with start() when it has not run yet."""
        self._serving[service] = serving
        if self.address:
            task = asyncio.get_running_loop().create_task(self._tell_health(service))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _tell_health(self, service: str) -> None:
        status = health_pb2.HealthCheckResponse
        await self._health.set(service, status.SERVING if self._serving[service] else status.NOT_SERVING)

    def on_drain(self, callback: Callable[[], Awaitable[None] | None]) -> None:
        """Run `callback` when a drain begins, after health says NOT_SERVING."""
        self._on_drain.append(callback)

    async def start(self) -> None:
        """Bind both ports, write the endpoint file, serve. Raises BindError naming the address that is taken."""
        reflected = [*self._services, health.SERVICE_NAME, reflection.SERVICE_NAME]
        reflection.enable_server_reflection(reflected, self.grpc)
        for service in self._serving:
            await self._tell_health(service)
        host, _, port = self._listen.rpartition(":")
        try:
            bound = self.grpc.add_insecure_port(self._listen)
        except RuntimeError as error:
            raise BindError(f"cannot listen on {self._listen}: is another process using port {port}?") from error
        self.address = f"{host}:{bound}"
        try:
            self._metrics = serve_metrics(self._metrics_port, host=self._metrics_host, registry=self._registry)
        except OSError as error:
            raise BindError(f"cannot serve metrics on {self._metrics_host}:{self._metrics_port}: {error}") from error
        self.metrics_url = self._metrics.url if self._metrics else None
        await self.grpc.start()
        if self._endpoint_file is not None:
            announce(self._endpoint_file, address=self.address, metrics_url=self.metrics_url)
        log.info("listening", server=self.name, address=self.address, metrics=self.metrics_url or "off")

    async def run_until_signalled(self) -> None:
        """Serve until SIGTERM or SIGINT, then drain; a second signal ends the drain at once."""
        signalled, again = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, lambda: again.set() if signalled.is_set() else signalled.set())
        await signalled.wait()
        drain, hurry = asyncio.create_task(self.stop()), asyncio.create_task(again.wait())
        await asyncio.wait({drain, hurry}, return_when=asyncio.FIRST_COMPLETED)
        if not drain.done():
            log.warning("second signal: stopping now")
            await self.grpc.stop(0)
        hurry.cancel()
        await drain

    async def stop(self) -> None:
        """Drain: NOT_SERVING, a moment for clients to notice, running calls finish within the grace, metrics last."""
        log.info("draining", server=self.name, grace_seconds=self._grace_seconds)
        await self._health.enter_graceful_shutdown()
        for callback in self._on_drain:
            result = callback()
            if result is not None:
                await result
        await asyncio.sleep(self._drain_seconds)
        await self.grpc.stop(self._grace_seconds)
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
        log.info("stopped", server=self.name)


def announce(path: Path, *, address: str | None, metrics_url: str | None) -> None:
    """Write where this process can be reached, in one rename so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps({"pid": os.getpid(), "address": address, "metrics_url": metrics_url}))
    temporary.replace(path)


class _Interceptor(grpc.aio.ServerInterceptor):
    """Around every handler, from outside in: metrics, log context, failures → status."""

    def __init__(self, metrics: GrpcServerMetrics) -> None:
        self._metrics = metrics

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler: grpc.RpcMethodHandler[Any, Any] | None = await continuation(handler_call_details)
        if handler is None:
            return None
        return observe(self._metrics, handler_call_details.method, _answer_failures(handler))


def _answer_failures(handler: grpc.RpcMethodHandler[Any, Any]) -> grpc.RpcMethodHandler[Any, Any]:
    async def unary_response(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        behaviour: Any = handler.stream_unary or handler.unary_unary
        with _log_context(context):
            try:
                result = behaviour(request, context)
                return await result if isinstance(result, Awaitable) else result
            except grpc.aio.AbortError:
                raise
            except Exception as error:
                await _abort(context, error)

    async def stream_response(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        behaviour: Any = handler.stream_stream or handler.unary_stream
        values = _log_values(context)
        responses = behaviour(request, context)
        if not hasattr(responses, "__aiter__"):  # the health and reflection services of grpc itself
            raise TypeError("server-streaming handlers must be async generators")
        try:
            # The context is entered per message: a generator resumes in whatever context its consumer has.
            with bound_context(**values):
                async for response in responses:
                    yield response
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            await _abort(context, error)

    return with_behaviour(handler, stream_response if handler.response_streaming else unary_response)


async def _abort(context: grpc.aio.ServicerContext[Any, Any], error: Exception) -> None:
    if isinstance(error, failures.RpcFailure):
        failure = error
    else:
        log.exception("a handler failed", error=type(error).__name__)
        failure = failures.internal(f"the server failed with {type(error).__name__}; its log has the details")
    await context.abort(*failures.to_status(failure))


def _log_values(context: grpc.aio.ServicerContext[Any, Any]) -> dict[str, object]:
    metadata: Any = context.invocation_metadata() or ()
    given = dict(metadata)
    values: dict[str, object] = {name: given[key] for name, key in METADATA_KEYS.items() if key in given}
    values.setdefault("request_id", uuid.uuid4().hex[:12])
    return values


@contextmanager
def _log_context(context: grpc.aio.ServicerContext[Any, Any]) -> Any:
    with bound_context(**_log_values(context)):
        yield
