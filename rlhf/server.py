"""The life of a gRPC server: bind, serve, drain on a signal, stop."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Literal, Self

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import REGISTRY, CollectorRegistry

from rlhf.channel import KEEPALIVE_SECONDS
from rlhf.endpoint import write_endpoint_file
from rlhf.health import Health
from rlhf.interceptor import CallInterceptor
from rlhf.logs import get_logger
from rlhf.metrics import DEFAULT_METRICS_HOST, GrpcServerMetrics, MetricsEndpoint, serve_metrics
from rlhf.security.access import Access
from rlhf.security.config import ServerSecurity
from rlhf.security.receiving import Receiving
from rlhf.security.roles import ROLES, RolesByRpc
from rlhf.security.settings import SecuredServerSettings
from rlhf.security.tls import server_credentials

_log = get_logger(__name__)

_KEEPALIVE_TIMEOUT_SECONDS = 20
# Below the 30 seconds of our own clients; gRPC's default of 300 cuts off whoever pings more often.
_MIN_PING_SECONDS = 10
_HANDSHAKE_SECONDS = 10
_MAX_STREAMS = 1024  # of one connection; more calls wait with the client
# gRPC's own default, said because memory depends on it: a connection whose metadata are larger is answered with errors.
_MAX_METADATA_BYTES = 16 << 10
_PROBES = 64
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_WILDCARDS = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "[::]": "[::1]"}
_OPEN = ServerSecurity()


class BindError(OSError):
    """The address to listen on is taken, or is none."""


class Server:
    """An asyncio gRPC server with health, reflection, metrics, bounded messages, and a drain that cuts no request.

    Make it inside a running event loop, add servicers to `grpc`, `register` their names, then `start`. Health answers
    SERVING for "" from the start on: the process is alive; a registered name says whether that service is ready.
    """

    def __init__(
        self,
        name: str,
        *,
        listen: str,
        metrics_port: int | Literal["auto"],
        max_message_bytes: int,
        drain_seconds: float,
        grace_seconds: float,
        endpoint_file: Path | None = None,
        metrics_host: str = DEFAULT_METRICS_HOST,
        registry: CollectorRegistry = REGISTRY,
        security: ServerSecurity = _OPEN,
        roles: RolesByRpc = ROLES,
    ) -> None:
        """`name` is for people. `listen`: host:port, port 0 = the OS picks. `metrics_port`: 0 = off.

        drain_seconds: from NOT_SERVING to refusing new calls, so that clients notice; grace_seconds: for the calls in
        flight then. `endpoint_file`: see rlhf/endpoint.py. `roles`: who may call what, where `security` has an access
        file. Raises CredentialsError.
        """
        self.name = name
        self._credentials = None if security.tls is None else server_credentials(security.tls)
        access = None
        if security.access_file is not None:
            certified = security.tls is not None and security.tls.client_ca is not None
            access = Access(security.access_file, with_certificates=certified, table=roles)
        receiving = Receiving(security.receive_seconds)
        self.grpc = grpc.aio.server(
            interceptors=[CallInterceptor(GrpcServerMetrics.of(registry), receiving, access)],
            options=[
                # Two servers on one port must be an error, not a coin toss for every connection.
                ("grpc.so_reuseport", 0),
                ("grpc.max_allowed_incoming_connections", security.max_connections),
                ("grpc.max_concurrent_streams", _MAX_STREAMS),
                ("grpc.absolute_max_metadata_size", _MAX_METADATA_BYTES),
                ("grpc.server_handshake_timeout_ms", _HANDSHAKE_SECONDS * 1000),
                ("grpc.max_receive_message_length", max_message_bytes),
                ("grpc.max_send_message_length", max_message_bytes),
                ("grpc.keepalive_time_ms", KEEPALIVE_SECONDS * 1000),
                ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_SECONDS * 1000),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.max_pings_without_data", 0),
                # Else a stream's window grows to 16 MiB, which is taken in whether or not anybody reads the stream.
                ("grpc.http2.bdp_probe", 0),
                ("grpc.http2.min_ping_interval_without_data_ms", _MIN_PING_SECONDS * 1000),
            ],
        )
        self._health_listen = security.health_listen
        self._probes: grpc.aio.Server | None = None
        self._health_address: str | None = None
        self._listen = listen
        self._metrics_port = metrics_port
        self._metrics_host = metrics_host
        self._registry = registry
        self._drain_seconds = drain_seconds
        self._grace_seconds = grace_seconds
        self._endpoint_file = endpoint_file
        self._services: list[str] = []
        self._health = Health()
        self._address: str | None = None
        self._metrics: MetricsEndpoint | None = None

    @classmethod
    def of(cls, name: str, settings: SecuredServerSettings) -> Self:
        """As a process is told by its settings. Raises CredentialsError."""
        return cls(
            name,
            listen=settings.listen,
            metrics_port=settings.metrics_port,
            metrics_host=settings.metrics_host,
            max_message_bytes=settings.max_message_bytes,
            drain_seconds=settings.drain_seconds,
            grace_seconds=settings.grace_seconds,
            endpoint_file=settings.endpoint_file,
            security=settings.security(),
        )

    @property
    def address(self) -> str:
        """host:port that reaches this server from its own machine, once started."""
        if self._address is None:
            raise RuntimeError(f"{self.name} is not started")
        return self._address

    @property
    def metrics_url(self) -> str | None:
        """Where the metrics are; None = off, or not started."""
        return None if self._metrics is None else self._metrics.url

    @property
    def health_address(self) -> str | None:
        """host:port of the health service for probes; None = it has no address of its own, or is not started."""
        return self._health_address

    def register(self, service: str, serving: bool) -> None:
        """Give a service (its full name) a health of its own and list it in reflection; before `start`."""
        self._services.append(service)
        self.set_serving(service, serving)

    def set_serving(self, service: str, serving: bool) -> None:
        """Change a service's health; on the event loop's thread. Does nothing once the server drains."""
        self._health.set_serving(service, serving)

    async def start(self) -> None:
        """Bind, serve, log where, write the endpoint file. Raises BindError naming the address that can't be had."""
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc)  # type: ignore[no-untyped-call]
        names = [*self._services, health.SERVICE_NAME, reflection.SERVICE_NAME]
        reflection.enable_server_reflection(names, self.grpc)  # type: ignore[no-untyped-call]
        try:
            if self._credentials is None:
                port = self.grpc.add_insecure_port(self._listen)
            else:
                port = self.grpc.add_secure_port(self._listen, self._credentials)
            self._metrics = serve_metrics(self._metrics_port, self._registry, self._metrics_host)
        except RuntimeError as error:
            raise BindError(f"{self.name} can't listen on {self._listen}: is another process there?") from error
        except OSError as error:
            raise BindError(f"{self.name} {error.strerror}") from error
        self._address = _reachable(self._listen, port)
        if self._health_listen is not None:
            await self._start_probes(self._health_listen)
        await self.grpc.start()
        _log.info("serving", address=self._address, metrics=self.metrics_url, health=self._health_address)
        if self._endpoint_file is not None:
            write_endpoint_file(
                self._endpoint_file,
                address=self._address,
                metrics_url=self.metrics_url,
                health_address=self._health_address,
            )

    async def run_until_signalled(self) -> None:
        """Serve until SIGTERM or SIGINT, then drain and return; a second signal ends the drain at once."""
        async with _signals() as received:
            ended = asyncio.create_task(self.grpc.wait_for_termination())
            first = asyncio.create_task(received.get())
            await asyncio.wait([ended, first], return_when=asyncio.FIRST_COMPLETED)
            if first.done():
                _log.info("draining", signal=first.result().name, grace_seconds=self._grace_seconds)
                drain = asyncio.create_task(self._drain())
                second = asyncio.create_task(received.get())
                await asyncio.wait([drain, second], return_when=asyncio.FIRST_COMPLETED)
                if second.done():
                    _log.warning("stopping at once", signal=second.result().name)
                    drain.cancel()
                second.cancel()
            first.cancel()
            await self.stop()
            await ended
        _log.info("stopped")

    async def stop(self) -> None:
        """Stop at once, cancelling the calls in flight; does nothing when stopped."""
        await self.grpc.stop(None)
        if self._probes is not None:
            await self._probes.stop(None)
        if self._metrics is not None:
            metrics, self._metrics = self._metrics, None
            await asyncio.to_thread(metrics.close)
        if self._endpoint_file is not None:
            self._endpoint_file.unlink(missing_ok=True)

    async def _start_probes(self, listen: str) -> None:
        """Answer health, and nothing else, in plaintext."""
        self._probes = grpc.aio.server(
            options=[
                ("grpc.so_reuseport", 0),
                ("grpc.max_allowed_incoming_connections", _PROBES),
                ("grpc.max_concurrent_streams", _PROBES),
                ("grpc.max_receive_message_length", 1024),
                ("grpc.server_handshake_timeout_ms", _HANDSHAKE_SECONDS * 1000),
                ("grpc.max_connection_idle_ms", _HANDSHAKE_SECONDS * 1000),
            ]
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._probes)  # type: ignore[no-untyped-call]
        try:
            port = self._probes.add_insecure_port(listen)
        except RuntimeError as error:
            raise BindError(f"{self.name} can't answer health on {listen}: is another process there?") from error
        self._health_address = _reachable(listen, port)
        await self._probes.start()

    async def _drain(self) -> None:
        """Tell clients to go elsewhere, give them time to notice, then let the calls in flight finish."""
        self._health.drain()
        await asyncio.sleep(self._drain_seconds)
        self._health.end_watches()
        await self.grpc.stop(self._grace_seconds)


@contextlib.asynccontextmanager
async def _signals() -> AsyncIterator[asyncio.Queue[signal.Signals]]:
    """SIGTERM and SIGINT, as they come, instead of what they do otherwise."""
    loop = asyncio.get_running_loop()
    received: asyncio.Queue[signal.Signals] = asyncio.Queue()
    for number in _SIGNALS:
        loop.add_signal_handler(number, received.put_nowait, number)
    try:
        yield received
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)


def _reachable(listen: str, port: int) -> str:
    if listen.startswith("unix:"):
        return listen
    host = listen.rpartition(":")[0]
    return f"{_WILDCARDS.get(host, host)}:{port}"
