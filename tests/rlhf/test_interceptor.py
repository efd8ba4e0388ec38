from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import grpc
import pytest
import structlog

from rlhf import failures
from rlhf.channel import call_metadata
from rlhf.failures import from_rpc_error
from tests.rlhf.conftest import Serve, Served, failure_of, result_of

FAILURES: dict[str, Callable[[], Exception]] = {
    "invalid": lambda: failures.invalid_argument("field", "is wrong"),
    "bug": lambda: ZeroDivisionError("a secret"),
}
KINDS = {
    "UnaryUnary": "UNARY",
    "UnaryStream": "SERVER_STREAMING",
    "StreamUnary": "CLIENT_STREAMING",
    "StreamStream": "BIDI_STREAMING",
}


async def _each(*messages: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    for message in messages:
        yield message


def _call(served: Served, method: str, message: dict[str, Any], **options: Any) -> Any:
    if method.startswith("Unary"):
        stub = served.stub.unary_unary if method == "UnaryUnary" else served.stub.unary_stream
        return stub(message, **options)
    stub = served.stub.stream_unary if method == "StreamUnary" else served.stub.stream_stream
    return stub(_each(message), **options)


async def _counted(served: Served, method: str, *codes: str) -> None:
    """Until the end of a call is counted under one of `codes`: a caller that gave up does not see it."""
    async with asyncio.timeout(20):
        while not any(served.sample("grpc_server_handled_total", method, grpc_code=code) == 1 for code in codes):  # noqa: ASYNC110 - a metric
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("method", KINDS)
async def test_a_failure_reaches_the_caller_from_every_kind_of_method(serve: Serve, method: str) -> None:
    async with serve(FAILURES) as served:
        received = from_rpc_error(await failure_of(_call(served, method, {"raise": "invalid"})))

        assert received.code is grpc.StatusCode.INVALID_ARGUMENT
        assert [violation.field for violation in received.violations] == ["field"]
        await _counted(served, method, "INVALID_ARGUMENT")


@pytest.mark.parametrize("method", KINDS)
async def test_an_unexpected_exception_tells_the_caller_its_type_and_the_log_the_rest(
    serve: Serve, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with serve(FAILURES) as served:
        received = from_rpc_error(await failure_of(_call(served, method, {"raise": "bug"})))

    assert received.code is grpc.StatusCode.INTERNAL
    assert "ZeroDivisionError" in received.message
    assert "secret" not in received.message
    assert "a secret" in caplog.text
    assert method in caplog.text


@pytest.mark.parametrize("method", KINDS)
async def test_a_handler_may_abort_by_itself(serve: Serve, method: str) -> None:
    async with serve() as served:
        error = await failure_of(_call(served, method, {"abort": "ALREADY_EXISTS"}))

        assert error.code() is grpc.StatusCode.ALREADY_EXISTS
        assert error.details() == "aborted by the handler itself"
        await _counted(served, method, "ALREADY_EXISTS")


@pytest.mark.parametrize("method", KINDS)
async def test_a_call_is_counted_with_its_messages(serve: Serve, method: str) -> None:
    async with serve() as served:
        await result_of(_call(served, method, {"answers": 3}))
        await _counted(served, method, "OK")

        kind = {"grpc_type": KINDS[method]}
        assert served.sample("grpc_server_started_total", method, **kind) == 1
        assert served.sample("grpc_server_msg_received_total", method, **kind) == 1
        assert served.sample("grpc_server_msg_sent_total", method, **kind) == (3 if method == "UnaryStream" else 1)
        assert served.sample("grpc_server_handling_seconds_count", method, **kind) == 1


async def test_streamed_requests_are_counted_one_by_one(serve: Serve) -> None:
    async with serve() as served:
        assert await served.stub.stream_unary(_each({}, {}, {})) == {"count": 3}

        assert served.sample("grpc_server_msg_received_total", "StreamUnary") == 3


@pytest.mark.parametrize("method", KINDS)
async def test_a_caller_that_cancels_interrupts_the_handler(serve: Serve, method: str) -> None:
    async with serve() as served:
        call = asyncio.create_task(result_of(_call(served, method, {"wait_seconds": 60})))
        await asyncio.wait_for(served.servicer.began.wait(), 20)
        call.cancel()

        await _counted(served, method, "CANCELLED")
        assert served.servicer.cut == ["CancelledError"]


@pytest.mark.parametrize("method", KINDS)
async def test_a_deadline_interrupts_the_handler(serve: Serve, method: str) -> None:
    async with serve() as served:
        await served.channel.channel_ready()
        error = await failure_of(_call(served, method, {"wait_seconds": 60}, timeout=2))

        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        # The server's deadline began when the call arrived; on a busy machine the caller's reset comes clearly before.
        await _counted(served, method, "DEADLINE_EXCEEDED", "CANCELLED")
        assert served.servicer.cut == ["CancelledError"]


async def test_messages_streamed_before_a_failure_arrive(serve: Serve) -> None:
    async with serve(FAILURES) as served:
        call = served.stub.unary_stream({"answers": 2, "raise": "invalid"})
        received = [await call.read(), await call.read()]
        await failure_of(call.read())

    assert received == [{"index": 0}, {"index": 1}]


async def test_an_unknown_method_is_answered_by_grpc(serve: Serve) -> None:
    async with serve() as served:
        error = await failure_of(served.channel.unary_unary("/test.Scripted/Nothing")(b""))

    assert error.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_request_that_cannot_be_decoded_disturbs_nothing(serve: Serve) -> None:
    async with serve() as served:
        error = await failure_of(served.channel.unary_unary("/test.Scripted/UnaryUnary")(b"no JSON"))

        assert error.code() is grpc.StatusCode.INTERNAL
        assert await served.stub.unary_unary({"still": "here"}) == {"still": "here"}


class _Contexts(logging.Handler):
    """Keeps the log context of each "acting" line."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, dict[str, Any]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        fields = record.__dict__["structlog_fields"]
        self.seen[fields["script"]] = structlog.contextvars.get_contextvars()


@pytest.fixture
def contexts() -> Iterator[_Contexts]:
    handler, logger = _Contexts(), logging.getLogger("tests.support.scripted_server")
    logger.addHandler(handler)
    logger.setLevel("INFO")
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


@pytest.mark.parametrize("method", KINDS)
async def test_log_lines_of_a_call_carry_what_its_metadata_says(serve: Serve, method: str, contexts: _Contexts) -> None:
    async with serve() as served:
        await asyncio.gather(
            *(
                result_of(
                    _call(
                        served,
                        method,
                        {"script": str(step), "wait_seconds": 0.05},
                        metadata=call_metadata(run_id="läuft gut", step=step, request_id=f"{step}-0"),
                    )
                )
                for step in range(3)
            )
        )

    assert contexts.seen == {
        str(step): {"run_id": "läuft gut", "step": step, "request_id": f"{step}-0"} for step in range(3)
    }


async def test_a_call_without_a_request_id_gets_one(serve: Serve, contexts: _Contexts) -> None:
    async with serve() as served:
        await served.stub.unary_unary({"script": "a"})
        await served.stub.unary_unary({"script": "b"}, metadata=(("x-rlhf-step", "no number"),))

    a, b = contexts.seen["a"], contexts.seen["b"]
    assert a.keys() == b.keys() == {"request_id"}
    assert a["request_id"] != b["request_id"]
