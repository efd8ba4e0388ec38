"""Spans by OpenTelemetry, sent over OTLP/gRPC by a thread of its own. Imported only when traces are on.

OpenTelemetry's own variables (OTEL_TRACES_SAMPLER, OTEL_BSP_…, OTEL_EXPORTER_OTLP_…) set what has no setting here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import grpc
import structlog
from opentelemetry import context as context_api
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from rlhf import __version__
from rlhf.addresses import is_loopback
from rlhf.logs import get_logger
from rlhf.security.config import CredentialsError
from rlhf.tracing import Attribute, TraceContext

_log = get_logger(__name__)

# What is left is sent within this time when the process ends.
_FLUSH_SECONDS = 3.0
_HEADERS = ("OTEL_EXPORTER_OTLP_HEADERS", "OTEL_EXPORTER_OTLP_TRACES_HEADERS")
# They would repeat with every batch what `_Delivery` says once.
_REPETITIVE = ("opentelemetry.exporter.otlp.proto.grpc.exporter", "opentelemetry.sdk._shared_internal")
_FROM_LOG_CONTEXT = ("run_id", "step", "request_id")
_W3C = ("traceparent", "tracestate")
_MAX_W3C_CHARACTERS = 512  # longer ones are left out, rather than warned of for as long as a caller likes
# Those of the conventions: the others are the caller's mistakes.
_SERVER_FAULTS = frozenset(
    {
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    }
)


class OtlpTracer:
    """Makes the spans of one process; see rlhf/tracing.py. `close` it to send the last of them."""

    def __init__(self, endpoint: str, *, service: str) -> None:
        """`endpoint`: http://host:port, or https:// for TLS. Nothing is connected yet. Raises CredentialsError."""
        _require_fit(endpoint)
        self._delivery = _Delivery(endpoint)
        resource = Resource.create({"service.name": service, "service.version": __version__})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(self._delivery))
        self._tracer = self._provider.get_tracer("rlhf", __version__)
        self._w3c = TraceContextTextMapPropagator()

    def span(
        self,
        name: str,
        *,
        root: bool,
        parent: TraceContext | None,
        links: Sequence[TraceContext],
        attributes: Mapping[str, Attribute],
    ) -> _Span:
        """Begin a span with these attributes and those of log lines."""
        within = context_api.Context() if root else _context_of(parent)
        return self._begin(name, trace.SpanKind.INTERNAL, within, attributes, links)

    def server_span(self, method: str, metadata: Sequence[tuple[str, str | bytes]]) -> _Span:
        """Begin a span for a call that came with this metadata."""
        carrier = {
            key: value
            for key, value in metadata
            if key in _W3C and isinstance(value, str) and len(value) <= _MAX_W3C_CHARACTERS
        }
        within = self._w3c.extract(carrier, context_api.Context())
        return self._begin(method, trace.SpanKind.SERVER, within, _rpc(method))

    def client_span(self, method: str) -> _Span:
        """Begin a span for a call that is made."""
        return self._begin(method, trace.SpanKind.CLIENT, None, _rpc(method))

    def here(self) -> TraceContext | None:
        """The current span, if there is any."""
        current = trace.get_current_span().get_span_context()
        return current if current.is_valid else None

    @contextlib.contextmanager
    def continuing(self, context: TraceContext) -> Iterator[None]:
        """Make a span current that is not ended here."""
        token = context_api.attach(_context_of(context) or context_api.Context())
        try:
            yield
        finally:
            context_api.detach(token)

    def annotate(self, attributes: Mapping[str, Attribute]) -> None:
        """Add to the current span."""
        trace.get_current_span().set_attributes(_named(attributes))

    def answered(self, code: grpc.StatusCode) -> None:
        """Note the code of the server's call whose span is current."""
        _set_code(trace.get_current_span(), code, is_error=code in _SERVER_FAULTS)

    def exemplar(self) -> dict[str, str] | None:
        """The current trace, if it is one that is sent."""
        current = trace.get_current_span().get_span_context()
        return {"trace_id": trace.format_trace_id(current.trace_id)} if current.trace_flags.sampled else None

    def client_interceptors(self) -> Sequence[grpc.aio.ClientInterceptor]:
        """For calls with one answer; none of our processes makes others."""
        return (_UnaryUnary(self), _StreamUnary(self))

    def injected(self, metadata: Any) -> list[tuple[str, Any]]:
        """`metadata` with the current span's context."""
        carrier: dict[str, str] = {}
        self._w3c.inject(carrier)
        return [*(metadata or ()), *carrier.items()]

    def close(self) -> None:
        """Send what is left, for a few seconds at most, and not at all to a receiver that does not answer."""
        with self._delivery.ending():
            self._provider.shutdown()

    def _begin(
        self,
        name: str,
        kind: trace.SpanKind,
        within: context_api.Context | None,
        attributes: Mapping[str, Attribute],
        links: Sequence[TraceContext] = (),
    ) -> _Span:
        known = structlog.contextvars.get_contextvars()
        shared = {key: known[key] for key in _FROM_LOG_CONTEXT if key in known}
        began = self._tracer.start_span(
            name,
            context=within,
            kind=kind,
            attributes=_named({**shared, **attributes}),
            links=[trace.Link(link) for link in links if isinstance(link, trace.SpanContext)],
        )
        return _Span(began, kind)


class _Span:
    """An OpenTelemetry span that is current inside. Of an exception it tells the type: messages may hold texts."""

    def __init__(self, span: trace.Span, kind: trace.SpanKind) -> None:
        self._span = span
        self._kind = kind
        self._token: Any = None

    @property
    def context(self) -> trace.SpanContext:
        return self._span.get_span_context()

    def ended_with(self, code: grpc.StatusCode) -> None:
        """How the client's call ended."""
        _set_code(self._span, code, is_error=code is not grpc.StatusCode.OK)

    def __enter__(self) -> _Span:
        self._token = context_api.attach(trace.set_span_in_context(self._span))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        context_api.detach(self._token)
        # How a call of the server ended, its code tells.
        if kind is not None and issubclass(kind, Exception) and self._kind is not trace.SpanKind.SERVER:
            self._span.set_status(trace.StatusCode.ERROR, kind.__name__)
        self._span.end()


class _UnaryUnary(grpc.aio.UnaryUnaryClientInterceptor):
    def __init__(self, tracer: OtlpTracer) -> None:
        self._tracer = tracer

    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        """A span around the call."""
        return await _traced(self._tracer, continuation, client_call_details, request)


class _StreamUnary(grpc.aio.StreamUnaryClientInterceptor):
    def __init__(self, tracer: OtlpTracer) -> None:
        self._tracer = tracer

    async def intercept_stream_unary(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        """A span around the call."""
        return await _traced(self._tracer, continuation, client_call_details, request_iterator)


async def _traced(tracer: OtlpTracer, proceed: Callable[[Any, Any], Awaitable[Any]], details: Any, request: Any) -> Any:
    """The call, ended; one that belongs to no span is left as it is, so that polling begins no traces."""
    if tracer.here() is None:
        return await proceed(details, request)
    method = details.method.decode() if isinstance(details.method, bytes) else details.method
    with tracer.client_span(method.removeprefix("/")) as span:
        call = await proceed(details._replace(metadata=tracer.injected(details.metadata)), request)
        try:
            span.ended_with(await call.code())
        except asyncio.CancelledError:
            # gRPC cancels the interceptor and leaves the call to it.
            call.cancel()
            span.ended_with(grpc.StatusCode.CANCELLED)
            raise
        return call


class _Delivery(SpanExporter):
    """OTLP's exporter, which says when spans begin to be lost, and when no longer, instead of at every batch."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._exporter = OTLPSpanExporter(endpoint=endpoint, insecure=endpoint.startswith("http://"))
        self._failing = False
        self._ending = False
        for name in _REPETITIVE:
            logging.getLogger(name).setLevel(logging.CRITICAL)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send them, on the processor's thread."""
        if self._failing and self._ending:
            return SpanExportResult.FAILURE
        result = self._exporter.export(spans)
        failed = result is not SpanExportResult.SUCCESS
        if failed and not self._failing:
            _log.warning("traces can't be delivered and are lost; all else goes on", otlp_endpoint=self._endpoint)
        elif self._failing and not failed:
            _log.info("traces are delivered again", otlp_endpoint=self._endpoint)
        self._failing = failed
        return result

    @contextlib.contextmanager
    def ending(self) -> Iterator[None]:
        """Around the processor's shutdown: what is not sent within a few seconds is dropped."""
        self._ending = True
        timer = threading.Timer(0 if self._failing else _FLUSH_SECONDS, self._exporter.shutdown)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def shutdown(self) -> None:
        """Close the connection."""
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        """Nothing is kept here."""
        return True


def _require_fit(endpoint: str) -> None:
    """Raise CredentialsError where what the environment gives as headers, a token most likely, would be readable."""
    given = [name for name in _HEADERS if os.environ.get(name)]
    if given and endpoint.startswith("http://") and not is_loopback(urlsplit(endpoint).netloc):
        raise CredentialsError(f"{given[0]} is sent to {endpoint} over TLS only: let otlp_endpoint begin with https://")


def _context_of(context: TraceContext | None) -> context_api.Context | None:
    if not isinstance(context, trace.SpanContext):
        return None
    return trace.set_span_in_context(trace.NonRecordingSpan(context), context_api.Context())


def _rpc(method: str) -> dict[str, Attribute]:
    return {"rpc.system.name": "grpc", "rpc.method": method}


def _named(attributes: Mapping[str, Attribute]) -> dict[str, Attribute]:
    """Ours below rlhf., those of the conventions as they are."""
    return {key if "." in key else f"rlhf.{key}": value for key, value in attributes.items()}


def _set_code(span: trace.Span, code: grpc.StatusCode, *, is_error: bool) -> None:
    span.set_attribute("rpc.response.status_code", code.name)
    if is_error:
        span.set_status(trace.StatusCode.ERROR, code.name)
