"""The client's side of a call: channels, retries of idempotent calls, and waiting that says what it waits for.

Retries are made here and not by gRPC's service config, which never sends a large request twice (one of 1 MiB got a
single attempt, without a word).
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from rlhf import tracing
from rlhf.addresses import is_loopback
from rlhf.failures import RpcFailure, from_rpc_error, is_transient
from rlhf.logs import get_logger
from rlhf.security.client import SecuredChannel
from rlhf.security.config import ClientSecurity

T = TypeVar("T")

DEFAULT_MAX_MESSAGE_BYTES = 64 << 20

RUN_ID_KEY = "x-rlhf-run-id"
STEP_KEY = "x-rlhf-step"
REQUEST_ID_KEY = "x-request-id"

KEEPALIVE_SECONDS = 30
_KEEPALIVE_TIMEOUT_SECONDS = 20

_CHECK_SECONDS = 5.0
_LOG_EVERY_SECONDS = 5.0

_log = get_logger(__name__)
# Of its own, so that jitter never moves the random numbers of a run.
_random = random.Random()


@dataclass(frozen=True)
class Keepalive:
    """How often, in seconds, a client pings a connection to learn that it is dead, and whether without a call too."""

    seconds: float
    without_calls: bool


# rlhf/server.py allows pings this often.
OWN_SERVERS = Keepalive(seconds=KEEPALIVE_SECONDS, without_calls=True)
# gRPC's servers in Go, Java and C++ end connections that ping more often than every 300 seconds, or without a call.
ANY_SERVERS = Keepalive(seconds=330, without_calls=False)


@dataclass(frozen=True)
class RetryPolicy:
    """Seconds between attempts: `initial`, then times `multiplier` up to `maximum`, each ± `jitter` of itself.

    attempts: most attempts altogether; None = until it succeeds or fails for good.
    """

    initial: float = 0.2
    maximum: float = 10.0
    multiplier: float = 2.0
    jitter: float = 0.2
    attempts: int | None = None


@dataclass(frozen=True)
class Waiting:
    """A wait that goes on: `reason` is the last attempt's failure, `since_seconds` the time since the first attempt."""

    on: str
    target: str
    since_seconds: float
    attempt: int
    reason: str


OnWait = Callable[[Waiting], None]


def open_channel(
    target: str,
    *,
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
    keepalive: Keepalive = OWN_SERVERS,
    security: ClientSecurity | None = None,
) -> grpc.aio.Channel:
    """A channel to "host:port" or any other name that gRPC resolves; nothing is connected yet.

    max_message_bytes: largest message either way; the server's own limit applies too. keepalive: ANY_SERVERS
    for servers that others may have written. security: None = neither TLS nor a token. Raises CredentialsError.
    """
    options: list[tuple[str, Any]] = [
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.keepalive_time_ms", round(keepalive.seconds * 1000)),
        ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_SECONDS * 1000),
        ("grpc.keepalive_permit_without_calls", int(keepalive.without_calls)),
        ("grpc.http2.max_pings_without_data", 0),
        # gRPC's own maximum of two minutes would hide a restarted server that long.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2000),
        # How long an attempt to connect may take, TLS included; gRPC's 20 seconds would outlast a lost node's return.
        ("grpc.min_reconnect_backoff_ms", 5000),
    ]
    if is_loopback(target):
        # A proxy from the environment can't reach this machine's loopback.
        options.append(("grpc.enable_http_proxy", 0))
    interceptors = tracing.client_interceptors()
    if security is None or security == ClientSecurity():
        return grpc.aio.insecure_channel(target, options=options, interceptors=interceptors)
    if security.tls is not None and security.tls.server_name:
        options.append(("grpc.ssl_target_name_override", security.tls.server_name))

    def connect(credentials: grpc.ChannelCredentials | None) -> grpc.aio.Channel:
        if credentials is None:
            return grpc.aio.insecure_channel(target, options=options, interceptors=interceptors)
        return grpc.aio.secure_channel(target, credentials, options=options, interceptors=interceptors)

    return SecuredChannel(target, security, connect)


def call_metadata(
    *, run_id: str | None = None, step: int | None = None, request_id: str | None = None
) -> tuple[tuple[str, str], ...]:
    """Metadata by which the server's log lines name the run, the step and the request; None = left out."""
    given = ((RUN_ID_KEY, run_id), (STEP_KEY, step), (REQUEST_ID_KEY, request_id))
    # Metadata is ASCII; the server undoes the quoting.
    return tuple((key, quote(str(value), safe=" /:@+,;=")) for key, value in given if value is not None)


async def call_with_retry(
    call: Callable[[], Awaitable[T]],
    *,
    policy: RetryPolicy,
    what: str,
    target: str = "",
    on_wait: OnWait | None = None,
    until: float | None = None,
) -> T:
    """The result of `call`, made again while it fails with a code that may pass; `call` sets its own deadline.

    `what` and `target` say on whom this waits: told to `on_wait` before each pause, else logged every few seconds.
    Raises RpcFailure for what is final, after the last of `policy.attempts`, and when the next attempt would begin
    after `until` (a time.monotonic()). Cancelling the task that awaits this ends it; a CANCELLED that the server
    answers (Java does when it drains) is tried again.
    """
    wait = _Wait(what, target, on_wait)
    delay = policy.initial
    while True:
        wait.attempt += 1
        try:
            return await call()
        except (grpc.RpcError, RpcFailure) as error:
            failure = error if isinstance(error, RpcFailure) else from_rpc_error(error)
            if not is_transient(failure) or wait.attempt == policy.attempts:
                if failure is error:
                    raise
                raise failure from error
            pause = delay * (1 + _random.uniform(-policy.jitter, policy.jitter))
            if failure.retry_after is not None:
                pause = max(pause, failure.retry_after * (1 + _random.uniform(0, policy.jitter)))
            if until is not None and time.monotonic() + pause >= until:
                raise failure from error
            wait.report(str(failure))
        await asyncio.sleep(pause)
        delay = min(policy.maximum, delay * policy.multiplier)


async def wait_until_ready(
    channel: grpc.aio.Channel,
    service: str,
    *,
    what: str,
    target: str = "",
    timeout: float | None,  # noqa: ASYNC109 - the message of the TimeoutError says more than asyncio.timeout's
    on_wait: OnWait | None = None,
) -> None:
    """Until the server's health says that `service` (a full name) serves; "" = until the server is alive.

    timeout: seconds, None = no limit. Raises TimeoutError naming what was waited for and why, RpcFailure for an answer
    that will not change (a server without grpc.health.v1). Waits are told as in `call_with_retry`.
    """
    stub: Any = health_pb2_grpc.HealthStub(channel)  # type: ignore[no-untyped-call]
    request = health_pb2.HealthCheckRequest(service=service)
    wait = _Wait(what, target, on_wait)
    delay, reason = 0.05, ""
    while True:
        wait.attempt += 1
        remaining = math.inf if timeout is None else max(timeout - wait.seconds(), 0.001)
        try:
            answer = await stub.Check(request, timeout=min(_CHECK_SECONDS, remaining))
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                return
            reason = f"{service or 'the server'} is {health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)}"
        except grpc.RpcError as error:
            failure = from_rpc_error(error)
            if failure.code is grpc.StatusCode.NOT_FOUND:
                reason = f"the server does not know {service}"
            elif not is_transient(failure):
                raise failure from error
            elif not reason or failure.code is not grpc.StatusCode.DEADLINE_EXCEEDED:
                # The last check may have no time for an answer: what the one before it was told says more.
                reason = str(failure)
        if timeout is not None and (remaining := timeout - wait.seconds()) <= 0:
            raise TimeoutError(f"{wait.name()} was not ready within {timeout:g} seconds: {reason}")
        wait.report(reason)
        await asyncio.sleep(min(delay * (1 + _random.uniform(0, 0.2)), remaining))
        delay = min(1.0, delay * 2)


class _Wait:
    """Counts the attempts of one wait and tells about it."""

    def __init__(self, on: str, target: str, on_wait: OnWait | None) -> None:
        self.attempt = 0
        self._on = on
        self._target = target
        self._on_wait = on_wait
        self._began = time.monotonic()
        self._said: float | None = None

    def seconds(self) -> float:
        return time.monotonic() - self._began

    def name(self) -> str:
        return f"{self._on} {self._target}".rstrip()

    def report(self, reason: str) -> None:
        waiting = Waiting(self._on, self._target, self.seconds(), self.attempt, reason)
        if self._on_wait is not None:
            self._on_wait(waiting)
            return
        now = time.monotonic()
        if self._said is None or now - self._said >= _LOG_EVERY_SECONDS:
            self._said = now
            _log.warning(
                f"waiting for {self.name()}",
                reason=reason,
                since_seconds=round(waiting.since_seconds, 1),
                attempt=self.attempt,
            )
