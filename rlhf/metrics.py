"""The metrics of every gRPC server, under the names that dashboards know, and the HTTP endpoint that shows them.

A process without a gRPC server has its liveness there too.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal
from wsgiref.simple_server import WSGIServer
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

import grpc
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from rlhf import tracing

DEFAULT_METRICS_HOST = "127.0.0.1"

# From a health check to the transfer of a large model.
_BUCKETS = (0.001, 0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_CALL = ("grpc_type", "grpc_service", "grpc_method")

CREDENTIALS_RELOADS = Counter(
    "rlhf_credentials_reloads_total",
    "Changed certificate, token and access files that were taken (ok) or could not be used (failed).",
    ("what", "outcome"),
)
CREDENTIALS_BROKEN = Gauge(
    "rlhf_credentials_broken", "1 while a changed file can't be used and the old one is still in force.", ("what",)
)
CERTIFICATE_EXPIRY = Gauge(
    "rlhf_certificate_expiry_timestamp_seconds",
    "When the first certificate of the chain in use stops being valid, in seconds since 1970.",
    ("what", "file"),
)
CALLS_DENIED = Counter("rlhf_calls_denied_total", "Calls that were refused before they began, by reason.", ("reason",))
QUOTA_SPENT = Counter("rlhf_quota_spent_total", "Units of its quota that an identity has used.", ("identity",))
QUOTA_REFUSED = Counter("rlhf_quota_refused_total", "Calls beyond the quota of an identity.", ("identity",))


@dataclass(frozen=True)
class MethodName:
    """The labels of one RPC method; `kind` is UNARY, CLIENT_STREAMING, SERVER_STREAMING or BIDI_STREAMING."""

    kind: str
    service: str
    method: str


class CallMetrics:
    """What is counted about one call while it runs; `code` is what the caller will see."""

    def __init__(self, metrics: GrpcServerMetrics, name: MethodName) -> None:
        labels = (name.kind, name.service, name.method)
        self._received = metrics.received.labels(*labels)
        self._sent = metrics.sent.labels(*labels)
        self.code = grpc.StatusCode.UNKNOWN

    def received(self) -> None:
        """One message came."""
        self._received.inc()

    def sent(self) -> None:
        """One message went."""
        self._sent.inc()


class GrpcServerMetrics:
    """The grpc_server_* metrics of one registry. Make it with `of`: a registry takes each name once."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.started = Counter("grpc_server_started_total", "Calls that began.", _CALL, registry=registry)
        self.handled = Counter(
            "grpc_server_handled_total", "Calls that ended, by code.", (*_CALL, "grpc_code"), registry=registry
        )
        self.received = Counter(
            "grpc_server_msg_received_total", "Messages that came from clients.", _CALL, registry=registry
        )
        self.sent = Counter("grpc_server_msg_sent_total", "Messages that went to clients.", _CALL, registry=registry)
        self.seconds = Histogram(
            "grpc_server_handling_seconds",
            "From a call's begin to its end.",
            _CALL,
            registry=registry,
            buckets=_BUCKETS,
        )

    @classmethod
    def of(cls, registry: CollectorRegistry) -> GrpcServerMetrics:
        """Those of `registry`, shared by all servers that use it."""
        if registry not in _metrics_of:
            _metrics_of[registry] = cls(registry)
        return _metrics_of[registry]

    @contextlib.contextmanager
    def call(self, name: MethodName) -> Iterator[CallMetrics]:
        """Count a call that runs inside; set `code` of what is yielded before it ends."""
        labels = (name.kind, name.service, name.method)
        call = CallMetrics(self, name)
        self.started.labels(*labels).inc()
        began = time.perf_counter()
        try:
            yield call
        finally:
            self.seconds.labels(*labels).observe(time.perf_counter() - began, tracing.exemplar())
            self.handled.labels(*labels, call.code.name).inc()


_metrics_of: weakref.WeakKeyDictionary[CollectorRegistry, GrpcServerMetrics] = weakref.WeakKeyDictionary()


class MetricsEndpoint:
    """Serves a registry over HTTP on a thread of its own until closed."""

    def __init__(self, host: str, server: WSGIServer, thread: threading.Thread) -> None:
        self._server = server
        self._thread = thread
        reachable = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)
        in_url = f"[{reachable}]" if ":" in reachable else reachable
        self.url = f"http://{in_url}:{server.server_port}/metrics"

    def close(self) -> None:
        """Stop serving; blocks for up to half a second."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Pulse:
    """Whether an event loop turns."""

    def __init__(self, *, limit: float = 60.0) -> None:
        """`limit`: after so many seconds without a turn it is taken for dead. It has so long to begin, too."""
        self._limit = limit
        self._last = time.monotonic()

    def begin(self) -> None:
        """Beat from now on, as long as the running loop turns."""
        self._last = time.monotonic()
        asyncio.get_running_loop().call_later(1.0, self.begin)

    def beats(self) -> bool:
        """From any thread."""
        return time.monotonic() - self._last < self._limit


def serve_metrics(
    port: int | Literal["auto"],
    registry: CollectorRegistry = REGISTRY,
    host: str = DEFAULT_METRICS_HOST,
    pulse: Pulse | None = None,
) -> MetricsEndpoint | None:
    """Serve the registry at http://host:port/metrics; port "auto" = the OS picks one, 0 = off, and None is returned.

    With a pulse, /livez answers 200 while it beats, else 503. Raises OSError naming the address when it is taken.
    """
    if port == 0:
        return None
    try:
        server, thread = start_http_server(0 if port == "auto" else port, addr=host, registry=registry)
    except OSError as error:
        raise OSError(error.errno, f"can't serve metrics on {host}:{port}: {error.strerror or error}") from error
    exposition = server.get_app()
    if pulse is not None and exposition is not None:
        server.set_app(_with_livez(exposition, pulse))
    return MetricsEndpoint(host, server, thread)


def _with_livez(others: WSGIApplication, pulse: Pulse) -> WSGIApplication:
    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if environ["PATH_INFO"] != "/livez":
            return others(environ, start_response)
        alive = pulse.beats()
        start_response("200 OK" if alive else "503 Service Unavailable", [("Content-Type", "text/plain")])
        return [b"ok\n" if alive else b"the event loop stands still\n"]

    return answer
