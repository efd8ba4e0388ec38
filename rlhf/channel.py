"""The client's side of a connection: limits, keepalive, retries that say what they wait for."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from time import monotonic
from typing import TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from rlhf import failures
from rlhf.logs import get_logger

log = get_logger(__name__)

T = TypeVar("T")

METADATA_KEYS = {"run_id": "x-rlhf-run-id", "step": "x-rlhf-step", "request_id": "x-request-id"}
"""Log context → the gRPC metadata key that carries it to a server."""

LOG_EVERY_SECONDS = 5.0


def open_channel(target: str, *, max_message_bytes: int = 64 << 20) -> grpc.aio.Channel:
    """A plaintext channel to `target` ("host:port" or any gRPC name) with messages bounded to `max_message_bytes`."""
    return grpc.aio.insecure_channel(
        target,
        options=[
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", max_message_bytes),
            ("grpc.keepalive_time_ms", 30_000),  # above every server's minimum of 10 s
            ("grpc.keepalive_timeout_ms", 20_000),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.enable_retries", 0),  # retries are ours: gRPC never retries a large unary call
            ("grpc.initial_reconnect_backoff_ms", 200),
            ("grpc.min_reconnect_backoff_ms", 200),
            ("grpc.max_reconnect_backoff_ms", 5_000),
        ],
    )


@dataclass(frozen=True)
class RetryPolicy:
    """Exponential backoff in seconds, each wait spread by ±jitter; attempts None = for as long as it takes."""

    initial: float = 0.2
    maximum: float = 10.0
    multiplier: float = 2.0
    jitter: float = 0.2
    attempts: int | None = None

    def delay(self, attempt: int) -> float:
        """Seconds to wait after failed attempt number `attempt` (from 1)."""
        delay = min(self.maximum, self.initial * self.multiplier ** min(attempt - 1, 64))
        return delay * random.uniform(1 - self.jitter, 1 + self.jitter)


@dataclass(frozen=True)
class Waiting:
    """What a client waits for, for people and metrics: on what, where, since when (seconds), and why."""

    on: str
    target: str
    since_seconds: float
    attempt: int
    reason: str


OnWait = Callable[[Waiting], None]


def call_metadata(
    *, run_id: str | None = None, step: int | None = None, request_id: str | None = None
) -> tuple[tuple[str, str], ...]:
    """gRPC metadata that puts run id, step and request id on the server's log lines."""
    values = {"run_id": run_id, "step": step, "request_id": request_id}
    return tuple((METADATA_KEYS[name], str(value)) for name, value in values.items() if value is not None)


async def call_with_retry(
    call: Callable[[], Awaitable[T]],
    *,
    policy: RetryPolicy | None = None,
    what: str,
    target: str = "",
    on_wait: OnWait | None = None,
) -> T:
    """Await `call()` again after each transient failure; the last failure is raised as RpcFailure.

    `call` makes one idempotent attempt, with a deadline of its own. Final failures are raised at once. The server's
    RetryInfo is the least wait. Cancelling the caller ends it: only a CANCELLED that the server sent is retried.
    """
    policy = policy or RetryPolicy()
    reporter = _Reporter(what, target, on_wait)
    attempt = 0
    while True:
        attempt += 1
        try:
            return await call()
        except failures.RpcFailure as error:
            failure = error
        except grpc.RpcError as error:
            failure = failures.from_rpc_error(error)
        if not failures.is_transient(failure) or (policy.attempts is not None and attempt >= policy.attempts):
            raise failure
        reporter.report(attempt, str(failure))
        await asyncio.sleep(max(policy.delay(attempt), failure.retry_after or 0.0))


async def wait_until_ready(
    channel: grpc.aio.Channel,
    service: str,
    *,
    what: str,
    target: str = "",
    timeout: float | None = None,  # noqa: ASYNC109 - it bounds the waits, not one await
    on_wait: OnWait | None = None,
) -> None:
    """Ask `grpc.health.v1` until `service` is SERVING; raises TimeoutError, saying on what, after `timeout` seconds."""
    stub = health_pb2_grpc.HealthStub(channel)
    policy = RetryPolicy(initial=0.05, maximum=1.0)
    reporter = _Reporter(what, target, on_wait)
    began, attempt = monotonic(), 0
    while True:
        attempt += 1
        try:
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5.0)
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                return
            reason = f"its health is {health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)}"
        except grpc.RpcError as error:
            reason = str(failures.from_rpc_error(error))
        reporter.report(attempt, reason)
        delay = policy.delay(attempt)
        if timeout is not None and monotonic() + delay - began > timeout:
            where = f" at {target}" if target else ""
            raise TimeoutError(f"{what}{where} was not ready within {timeout:g} s: {reason}")
        await asyncio.sleep(delay)


class _Reporter:
    """Tells a caller who listens of every wait, else the log of one now and then."""

    def __init__(self, what: str, target: str, on_wait: OnWait | None) -> None:
        self._what, self._target, self._on_wait = what, target, on_wait
        self._began = monotonic()
        self._logged_at: float | None = None

    def report(self, attempt: int, reason: str) -> None:
        now = monotonic()
        waiting = Waiting(self._what, self._target, now - self._began, attempt, reason)
        if self._on_wait is not None:
            self._on_wait(waiting)
            return
        if self._logged_at is None or now - self._logged_at >= LOG_EVERY_SECONDS:
            self._logged_at = now
            log.warning(
                "waiting",
                on=waiting.on,
                target=waiting.target,
                since_seconds=round(waiting.since_seconds, 1),
                reason=reason,
            )
