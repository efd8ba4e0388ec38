"""gRPC's health service, whose watchers can't hold anybody up.

grpcio-health-checking's own writes to a watcher under the lock that a change of status needs: one that reads nothing
stops every change, and the drain of a server with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from rlhf.failures import not_found, to_status, unavailable

_Context = grpc.aio.ServicerContext[Any, Any]
_Response = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):
    """The status of each service, by full name; "" is the process, which serves from the start on.

    All of it is called on the event loop's thread.
    """

    def __init__(self) -> None:
        self._statuses = {"": _Response.SERVING}
        self._draining = False
        self._ended = False
        self._news = asyncio.Event()

    def set_serving(self, service: str, serving: bool) -> None:
        """Change a service's status; does nothing once the server drains."""
        if not self._draining:
            self._statuses[service] = _Response.SERVING if serving else _Response.NOT_SERVING
            self._tell()

    def drain(self) -> None:
        """Nothing serves from here on, the process itself included."""
        self._draining = True
        self._statuses = dict.fromkeys(self._statuses, _Response.NOT_SERVING)
        self._tell()

    def end_watches(self) -> None:
        """End all watches, and those that come, with UNAVAILABLE: each would hold a drain up for its whole grace."""
        self._ended = True
        self._tell()

    async def Check(  # noqa: N802 - gRPC's name
        self, request: health_pb2.HealthCheckRequest, context: _Context
    ) -> health_pb2.HealthCheckResponse:
        """The status of a service now."""
        status = self._statuses.get(request.service)
        if status is None:
            await context.abort(*to_status(not_found("service", f"service {request.service[:64]!r}")))
        return _Response(status=status)

    async def Watch(  # noqa: N802 - gRPC's name
        self, request: health_pb2.HealthCheckRequest, context: _Context
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """The status of a service, and again when it has changed; what comes and goes meanwhile is left out."""
        said = None
        while not self._ended:
            news = self._news
            status = self._statuses.get(request.service, _Response.SERVICE_UNKNOWN)
            if status == said:
                await news.wait()
            else:
                said = status
                yield _Response(status=status)
        await context.abort(*to_status(unavailable("the server stops")))

    def _tell(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()
