"""Prometheus plumbing: the grpc_server_* metrics that dashboards already know, and the endpoint that serves them."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal
from wsgiref.simple_server import WSGIServer

import grpc
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram, start_http_server

MetricsPort = int | Literal["auto"]

_LABELS = ("grpc_type", "grpc_service", "grpc_method")
# From a health check to a publish of a large model.
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class GrpcServerMetrics:
    """Counters and latencies of every call a server handles, under go-grpc-prometheus' names."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.started = Counter("grpc_server_started_total", "Calls started.", _LABELS, registry=registry)
        self.handled = Counter(
            "grpc_server_handled_total", "Calls completed, by status code.", (*_LABELS, "grpc_code"), registry=registry
        )
        self.received = Counter("grpc_server_msg_received_total", "Messages received.", _LABELS, registry=registry)
        self.sent = Counter("grpc_server_msg_sent_total", "Messages sent.", _LABELS, registry=registry)
        self.seconds = Histogram(
            "grpc_server_handling_seconds", "Time in the handler.", _LABELS, registry=registry, buckets=_SECONDS
        )


@dataclass(frozen=True)
class MetricsEndpoint:
    """A running /metrics endpoint."""

    url: str
    _server: WSGIServer
    _thread: threading.Thread

    def close(self) -> None:
        """Stop serving and release the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def serve_metrics(
    port: MetricsPort, *, host: str = "127.0.0.1", registry: CollectorRegistry = REGISTRY
) -> MetricsEndpoint | None:
    """Serve `registry` on host:port from a thread; 0 = off (None is returned), "auto" = the OS picks the port.

    Raises OSError when the port is taken.
    """
    if port == 0:
        return None
    server, thread = start_http_server(0 if port == "auto" else port, addr=host, registry=registry)
    return MetricsEndpoint(f"http://{host}:{server.server_port}/metrics", server, thread)


Handler = Callable[[Any, grpc.aio.ServicerContext[Any, Any]], Any]


def observe(
    metrics: GrpcServerMetrics, method: str, handler: grpc.RpcMethodHandler[Any, Any]
) -> grpc.RpcMethodHandler[Any, Any]:
    """The same handler, counted."""
    service, _, name = method.removeprefix("/").rpartition("/")
    kind = {
        (False, False): "unary",
        (True, False): "client_stream",
        (False, True): "server_stream",
        (True, True): "bidi_stream",
    }[(handler.request_streaming, handler.response_streaming)]
    labels = (kind, service, name)

    async def count_requests(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async for request in requests:
            metrics.received.labels(*labels).inc()
            yield request

    def begin(request: Any) -> Any:
        metrics.started.labels(*labels).inc()
        if handler.request_streaming:
            return count_requests(request)
        metrics.received.labels(*labels).inc()
        return request

    def end(context: grpc.aio.ServicerContext[Any, Any], began: float, code: str | None) -> None:
        metrics.seconds.labels(*labels).observe(perf_counter() - began)
        metrics.handled.labels(*labels, code or _code_of(context)).inc()

    async def unary_response(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        began, code = perf_counter(), "CANCELLED"
        behaviour: Any = handler.stream_unary or handler.unary_unary
        try:
            response = await behaviour(begin(request), context)
            metrics.sent.labels(*labels).inc()
            code = ""
            return response
        except Exception:
            code = _code_of(context, failed=True)
            raise
        finally:
            end(context, began, code or None)

    async def stream_response(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        began, code = perf_counter(), "CANCELLED"
        behaviour: Any = handler.stream_stream or handler.unary_stream
        try:
            async for response in behaviour(begin(request), context):
                metrics.sent.labels(*labels).inc()
                yield response
            code = ""
        except Exception:
            code = _code_of(context, failed=True)
            raise
        finally:
            end(context, began, code or None)

    return with_behaviour(handler, stream_response if handler.response_streaming else unary_response)


def with_behaviour(handler: grpc.RpcMethodHandler[Any, Any], behaviour: Handler) -> grpc.RpcMethodHandler[Any, Any]:
    """The handler with another function in place of its own, of the same arity and serialisation."""
    make: Any = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[(handler.request_streaming, handler.response_streaming)]
    return make(
        behaviour,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )


def _code_of(context: grpc.aio.ServicerContext[Any, Any], *, failed: bool = False) -> str:
    code = context.code()
    if isinstance(code, grpc.StatusCode) and (code is not grpc.StatusCode.OK or not failed):
        return code.name
    if isinstance(code, int) and code:
        return next((known.name for known in grpc.StatusCode if known.value[0] == code), "UNKNOWN")
    return "UNKNOWN" if failed else "OK"
