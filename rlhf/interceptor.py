"""What surrounds every call on a server: metrics, log context and trace, failures as status codes, who may call."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, TypeAlias, cast
from urllib.parse import unquote

import grpc

from rlhf import tracing
from rlhf.channel import REQUEST_ID_KEY, RUN_ID_KEY, STEP_KEY
from rlhf.failures import RpcFailure, internal, to_status
from rlhf.logs import bound_context, get_logger
from rlhf.metrics import CallMetrics, GrpcServerMetrics, MethodName
from rlhf.security.access import Access
from rlhf.security.caller import called_by
from rlhf.security.receiving import Receiving

_log = get_logger(__name__)

_Context = grpc.aio.ServicerContext[Any, Any]
_Behaviour = Callable[[Any, _Context], Any]
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"  # no generic when it runs

_MAX_ID_CHARACTERS = 128


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Surrounds handlers that are coroutines or asynchronous generators, for all four kinds of RPC.

    A handler raises RpcFailure to end its call; any other exception becomes INTERNAL, naming only its type, and is
    logged. When the caller goes away a handler sees CancelledError, or GeneratorExit where it yields. Methods that a
    servicer leaves unimplemented are answered by gRPC itself and not counted.
    """

    def __init__(self, metrics: GrpcServerMetrics, receiving: Receiving, access: Access | None) -> None:
        """`access`: None = everybody may call everything."""
        self._metrics = metrics
        self._receiving = receiving
        self._access = access

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        """Wrap the handler of this call."""
        handler = await continuation(handler_call_details)
        if handler is None:  # gRPC's word for no such method
            return None
        behaviour = _behaviour(handler)
        if not (inspect.iscoroutinefunction(behaviour) or inspect.isasyncgenfunction(behaviour)):
            if self._access is not None:
                raise TypeError(f"{handler_call_details.method} is not asynchronous: nothing would ask who calls it")
            return handler
        name = _method_name(handler_call_details.method, handler)
        sent = tuple(handler_call_details.invocation_metadata or ())
        metadata = _text_metadata(sent)

        async def surrounded(requests: Any, context: _Context) -> Any:
            with (
                _log_context(metadata),
                tracing.server_span(f"{name.service}/{name.method}", sent),
                self._metrics.call(name) as call,
            ):
                async with _failures_as_status(context, call, name), contextlib.AsyncExitStack() as stack:
                    caller = None
                    if self._access is not None:
                        caller = self._access.admit(handler_call_details.method, sent, context)
                    stack.enter_context(called_by(caller))
                    request: Any = _CountedRequests(requests, call)
                    if not handler.request_streaming:
                        request = await self._receiving.only(request, caller.name if caller else context.peer())
                    if not inspect.isasyncgenfunction(behaviour):
                        response = await behaviour(request, context)
                        if not handler.response_streaming:
                            call.sent()
                        return response
                    # Written from here, and not yielded on, so that the caller's going away is seen here at once.
                    async with contextlib.aclosing(behaviour(request, context)) as responses:
                        async for response in responses:
                            await context.write(response)
                            call.sent()
                    return None

        return _with_behaviour(handler, surrounded)


# The server's clock for a deadline starts when the call arrives, so the caller's reset comes about this much before.
_ARRIVAL_SECONDS = 0.05


class _CountedRequests:
    """A stream of requests that counts what passes."""

    def __init__(self, requests: AsyncIterator[Any], call: CallMetrics) -> None:
        self._requests = aiter(requests)
        self._call = call

    def __aiter__(self) -> _CountedRequests:
        return self

    async def __anext__(self) -> Any:
        request = await anext(self._requests)
        self._call.received()
        return request


@contextlib.asynccontextmanager
async def _failures_as_status(context: _Context, call: CallMetrics, name: MethodName) -> AsyncIterator[None]:
    """End the call as what is raised inside demands, and note the code that the caller sees."""
    try:
        yield
        # None, against its annotation, while nothing was set.
        call.code = cast(grpc.StatusCode | None, context.code()) or grpc.StatusCode.OK
    except RpcFailure as failure:
        call.code = failure.code
        await context.abort(*to_status(failure))
    except grpc.aio.AbortError:
        call.code = context.code()
        raise
    except asyncio.CancelledError:
        left = context.time_remaining()
        late = left is not None and left <= _ARRIVAL_SECONDS
        call.code = grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED
        raise
    except Exception as error:
        _log.exception(f"{name.service}/{name.method} failed")
        call.code = grpc.StatusCode.INTERNAL
        await context.abort(*to_status(internal(f"{type(error).__name__} in the server, whose log says more")))
    finally:
        tracing.answered(call.code)
        _log.debug("answered", method=f"{name.service}/{name.method}", code=call.code.name)


def _log_context(metadata: dict[str, str]) -> contextlib.AbstractContextManager[None]:
    step = metadata.get(STEP_KEY, "")
    return bound_context(
        run_id=metadata.get(RUN_ID_KEY),
        step=int(step) if step.isdecimal() else None,
        request_id=metadata.get(REQUEST_ID_KEY) or uuid.uuid4().hex,
    )


def _text_metadata(metadata: Iterable[tuple[str, str | bytes]]) -> dict[str, str]:
    """What the log context is made of, out of a caller's hands and so cut."""
    wanted = (RUN_ID_KEY, STEP_KEY, REQUEST_ID_KEY)
    return {key: unquote(str(value)[:_MAX_ID_CHARACTERS]) for key, value in metadata if key in wanted}


def _behaviour(handler: _Handler) -> _Behaviour:
    behaviour: _Behaviour = getattr(handler, _shape(handler))
    return behaviour


def _with_behaviour(handler: _Handler, behaviour: _Behaviour) -> _Handler:
    """`behaviour` takes a stream of requests, whatever the method does: see rlhf/security/receiving.py."""
    make = grpc.stream_stream_rpc_method_handler if handler.response_streaming else grpc.stream_unary_rpc_method_handler
    wrapped: _Handler = make(
        behaviour, request_deserializer=handler.request_deserializer, response_serializer=handler.response_serializer
    )
    return wrapped


def _shape(handler: _Handler) -> str:
    """gRPC's own word: "unary_stream" takes one message and answers many."""
    return "_".join("stream" if many else "unary" for many in (handler.request_streaming, handler.response_streaming))


_KINDS = {
    "unary_unary": "UNARY",
    "stream_unary": "CLIENT_STREAMING",
    "unary_stream": "SERVER_STREAMING",
    "stream_stream": "BIDI_STREAMING",
}


def _method_name(path: str, handler: _Handler) -> MethodName:
    service, _, method = path.removeprefix("/").rpartition("/")
    return MethodName(_KINDS[_shape(handler)], service, method)
