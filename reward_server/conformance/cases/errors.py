"""The details that the statuses of the run carry."""

from __future__ import annotations

from collections.abc import Iterator

import grpc

from reward_server.conformance.case import Level, watch
from reward_server.conformance.cases.requests import send_typical_mistakes
from reward_server.conformance.exchange import Exchange
from reward_server.conformance.status import Status

_DOMAIN = "rlhf-services"
_NOTHING_REFUSED = "no wrong request was refused with the code for it"


@watch(
    "errors/error-info",
    Level.SHOULD,
    'Errors. The code is a MUST, the google.rpc details are a SHOULD: ErrorInfo with the domain "rlhf-services" and '
    "the reason below.",
    absent=_NOTHING_REFUSED,
    probe=send_typical_mistakes,
)
def error_info(exchange: Exchange) -> Iterator[str | None]:
    """Every status has ErrorInfo with the domain and the reason."""
    status, reason = exchange.status, ""
    if _as_promised(exchange) is not None and exchange.mistake is not None:
        reason = exchange.mistake.reason
    elif status is not None and status.overloaded:
        reason = "OVERLOADED"
    if status is not None and reason:
        right = (status.domain, status.reason) == (_DOMAIN, reason)
        yield None if right else f"expected ErrorInfo({_DOMAIN}, {reason})"


@watch(
    "errors/field-paths",
    Level.SHOULD,
    "INVALID_ARGUMENT and NOT_FOUND carry BadRequest with the paths of the wrong fields, written as in this file: "
    "samples[3].sample_id.",
    absent=_NOTHING_REFUSED,
    probe=send_typical_mistakes,
)
def field_paths(exchange: Exchange) -> Iterator[str | None]:
    """INVALID_ARGUMENT and NOT_FOUND name the wrong field."""
    status = _as_promised(exchange)
    if status is not None and exchange.mistake is not None and exchange.mistake.paths:
        named = set(exchange.mistake.paths) & set(status.paths)
        yield None if named else f"expected BadRequest with the path {exchange.mistake.paths[0]}"


@watch(
    "errors/retry-info",
    Level.SHOULD,
    "| RESOURCE_EXHAUSTED | OVERLOADED | with RetryInfo: too many calls or samples at once | after the delay |",
    absent="the server was never overloaded",
)
def retry_info(exchange: Exchange) -> Iterator[str | None]:
    """An overloaded server says when to come back, or clients take the request for too large."""
    if exchange.code is grpc.StatusCode.RESOURCE_EXHAUSTED and exchange.mistake is None and exchange.watched:
        assert exchange.status is not None
        yield None if exchange.status.retry_seconds is not None else "RESOURCE_EXHAUSTED without RetryInfo"


def _as_promised(exchange: Exchange) -> Status | None:
    """The status of a wrong request, where its code is right."""
    return exchange.status if exchange.mistake is not None and exchange.code in exchange.mistake.codes else None
