"""A receiver of OTLP traces over gRPC, in this process, which keeps what comes."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.common.v1.common_pb2 import AnyValue

SOON = {"OTEL_BSP_SCHEDULE_DELAY": "100"}
"""The environment of a process that sends its spans ten times a second."""


@dataclass(frozen=True)
class Span:
    """One that came; `links` are pairs of trace and span id."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    kind: int
    failed: str
    attributes: dict[str, Any]
    links: tuple[tuple[str, str], ...]

    @property
    def place(self) -> tuple[str, str]:
        """What a link to it holds."""
        return self.trace_id, self.span_id


class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
    """`spans` in the order in which they came, `requests` as bytes, `headers` of the last request."""

    def __init__(self) -> None:
        self.address = ""
        self.spans: list[Span] = []
        self.requests: list[bytes] = []
        self.headers: dict[str, Any] = {}

    @property
    def endpoint(self) -> str:
        """For --otlp-endpoint, in plaintext."""
        return f"http://{self.address}"

    def Export(  # noqa: N802 - the contract's name
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: Any
    ) -> Any:
        self.headers = {each.key: each.value for each in context.invocation_metadata()}
        self.requests.append(request.SerializeToString())
        for resource in request.resource_spans:
            (service,) = (
                each.value.string_value for each in resource.resource.attributes if each.key == "service.name"
            )
            for scope in resource.scope_spans:
                self.spans += [_span(service, each) for each in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    def named(self, name: str, **attributes: Any) -> list[Span]:
        """Those of this name that have these attributes, `step` meaning rlhf.step."""
        wanted = {f"rlhf.{key}": value for key, value in attributes.items()}
        return [span for span in list(self.spans) if span.name == name and wanted.items() <= span.attributes.items()]

    def ancestors(self, span: Span) -> list[Span]:
        """Its parent, that one's parent, and so on up to the root, as far as they came."""
        known = {each.place: each for each in list(self.spans)}
        line = []
        while (parent := known.get((span.trace_id, span.parent_id))) is not None:
            line.append(parent)
            span = parent
        return line


@contextmanager
def receiver(address: str = "127.0.0.1:0", credentials: grpc.ServerCredentials | None = None) -> Iterator[Receiver]:
    """A receiver that listens while the block runs; a port of 0 is one that the OS picks."""
    server = grpc.server(ThreadPoolExecutor(2), options=(("grpc.so_reuseport", 0),))
    receives = Receiver()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(receives, server)
    secure = credentials is not None
    port = server.add_secure_port(address, credentials) if secure else server.add_insecure_port(address)
    receives.address = f"{address.rpartition(':')[0]}:{port}"
    server.start()
    try:
        yield receives
    finally:
        server.stop(None).wait()


def _span(service: str, span: Any) -> Span:
    return Span(
        service=service,
        name=span.name,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        kind=span.kind,
        failed=span.status.message if span.status.code else "",
        attributes={each.key: _value(each.value) for each in span.attributes},
        links=tuple((link.trace_id.hex(), link.span_id.hex()) for link in span.links),
    )


def _value(value: AnyValue) -> Any:
    return getattr(value, value.WhichOneof("value"))
