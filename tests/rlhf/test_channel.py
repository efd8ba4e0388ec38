from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Callable

import grpc
import pytest

from rlhf import failures
from rlhf.channel import (
    ANY_SERVERS,
    Keepalive,
    RetryPolicy,
    Waiting,
    call_metadata,
    call_with_retry,
    open_channel,
    wait_until_ready,
)
from rlhf.failures import RpcFailure
from tests.rlhf.conftest import Serve
from tests.support.scripted_server import SERVICE, ScriptedServicer, Stub

Code = grpc.StatusCode
FAST = RetryPolicy(initial=0.01, maximum=0.05)


class _FailsAtFirst:
    """Asks for each failure in turn, then for an answer."""

    def __init__(self, *makes: Callable[[], Exception]) -> None:
        self.left = list(makes)

    async def call(self, stub: Stub, **message: object) -> object:
        if self.left:
            return await stub.unary_unary({"raise": "next", **message}, timeout=5)
        return await stub.unary_unary(message, timeout=5)

    def next(self) -> Exception:
        return self.left.pop(0)()


@pytest.mark.parametrize(
    "failure",
    [
        failures.unavailable("loading"),
        failures.overloaded("full", 0.01),
        RpcFailure(Code.CANCELLED, "the server drains, as one in Java does"),
        RpcFailure(Code.DEADLINE_EXCEEDED, "too slow"),
    ],
    ids=lambda failure: failure.code.name,
)
async def test_a_call_that_may_succeed_later_is_made_again(serve: Serve, failure: RpcFailure) -> None:
    script = _FailsAtFirst(lambda: failure, lambda: failure)
    waits: list[Waiting] = []
    async with serve({"next": script.next}) as served:
        answer = await call_with_retry(
            lambda: script.call(served.stub), policy=FAST, what="server", target="here", on_wait=waits.append
        )

    assert answer == {}
    assert [(wait.on, wait.target, wait.attempt) for wait in waits] == [("server", "here", 1), ("server", "here", 2)]
    assert all(failure.message in wait.reason and wait.since_seconds >= 0 for wait in waits)


@pytest.mark.parametrize(
    "failure",
    [
        failures.invalid_argument("field", "is wrong"),
        failures.too_large("a message over the limit has this code too"),
        failures.aborted("STALE_VERSION", "lost"),
        failures.internal("a bug"),
    ],
    ids=lambda failure: failure.code.name,
)
async def test_a_call_that_is_final_is_made_once(serve: Serve, failure: RpcFailure) -> None:
    script = _FailsAtFirst(lambda: failure)
    async with serve({"next": script.next}) as served:
        with pytest.raises(RpcFailure) as caught:
            await call_with_retry(lambda: script.call(served.stub), policy=FAST, what="server")

        assert vars(caught.value) == vars(failure)
        assert len(served.servicer.requests) == 1


async def test_a_request_that_grpc_itself_would_send_once_is_sent_again(serve: Serve) -> None:
    script = _FailsAtFirst(lambda: failures.unavailable("loading"))
    large = "a" * (3 << 20)
    async with serve({"next": script.next}) as served:
        answer = await call_with_retry(lambda: script.call(served.stub, text=large), policy=FAST, what="server")

        assert answer == {"text": large}
        assert len(served.servicer.requests) == 2


async def test_attempts_are_limited_when_asked(serve: Serve) -> None:
    async with serve({"down": lambda: failures.unavailable("loading")}) as served:
        with pytest.raises(RpcFailure, match="UNAVAILABLE: loading"):
            await call_with_retry(
                lambda: served.stub.unary_unary({"raise": "down"}),
                policy=RetryPolicy(initial=0.001, attempts=3),
                what="server",
            )

        assert len(served.servicer.requests) == 3


async def test_a_server_says_how_long_to_stay_away(serve: Serve) -> None:
    script = _FailsAtFirst(lambda: failures.overloaded("full", 0.4))
    async with serve({"next": script.next}) as served:
        began = asyncio.get_running_loop().time()
        await call_with_retry(lambda: script.call(served.stub), policy=FAST, what="server")

    assert asyncio.get_running_loop().time() - began >= 0.4


async def test_no_attempt_is_waited_for_that_would_begin_too_late(serve: Serve) -> None:
    async with serve({"full": lambda: failures.overloaded("full", 30.0)}) as served:
        until = asyncio.get_running_loop().time() + 10
        with pytest.raises(RpcFailure, match="full") as caught:
            await call_with_retry(
                lambda: served.stub.unary_unary({"raise": "full"}), policy=FAST, what="server", until=until
            )

        assert caught.value.retry_after == 30.0
        assert asyncio.get_running_loop().time() < until
        assert len(served.servicer.requests) == 1


async def test_cancelling_the_caller_ends_the_call_and_the_retries(serve: Serve) -> None:
    async with serve() as served:
        task = asyncio.create_task(
            call_with_retry(lambda: served.stub.unary_unary({"wait_seconds": 60}), policy=FAST, what="server")
        )
        await asyncio.wait_for(served.servicer.began.wait(), 20)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await served.stub.unary_unary({})

        assert served.servicer.requests == [{"wait_seconds": 60}, {}]


async def test_an_attempts_deadline_is_not_the_end(serve: Serve) -> None:
    async with serve() as served:
        waits = iter([60, 0])
        answer = await call_with_retry(
            lambda: served.stub.unary_unary({"wait_seconds": (wait := next(waits))}, timeout=0.2 if wait else 20),
            policy=FAST,
            what="server",
        )

    assert answer == {"wait_seconds": 0}


async def test_calls_outlive_a_server_that_goes_and_comes_back(serve: Serve) -> None:
    async with serve() as first:
        address = first.server.address
    async with open_channel(address) as channel:
        waiting = asyncio.Event()
        call = asyncio.create_task(
            call_with_retry(
                lambda: Stub(channel).unary_unary({"a": 1}, timeout=20),
                policy=FAST,
                what="server",
                on_wait=lambda _: waiting.set(),
            )
        )
        await asyncio.wait_for(waiting.wait(), 20)
        async with serve(listen=address):
            assert await asyncio.wait_for(call, 30) == {"a": 1}


async def test_a_channel_without_calls_pings_only_where_it_may() -> None:
    pings: list[str] = []
    pinged_often = asyncio.Event()
    connections: list[asyncio.Task[None] | None] = []

    async def count_pings(name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """As much of an HTTP/2 server as a client without calls needs."""
        connections.append(asyncio.current_task())
        writer.write(b"\0\0\0\x04\0\0\0\0\0")  # our settings: none
        await reader.readexactly(len(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"))
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while header := await reader.readexactly(9):
                payload = await reader.readexactly(int.from_bytes(header[:3]))
                kind, flags = header[3], header[4]
                if kind == 0x4 and not flags:
                    writer.write(b"\0\0\0\x04\x01\0\0\0\0")  # acknowledges the client's settings
                if kind == 0x6 and not flags:
                    pings.append(name)
                    writer.write(b"\0\0\x08\x06\x01\0\0\0\0" + payload)
                    if pings.count("eager") == 3:
                        pinged_often.set()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    async with contextlib.AsyncExitStack() as stack:
        for name, without_calls in (("quiet", False), ("eager", True)):
            server = await asyncio.start_server(functools.partial(count_pings, name), "127.0.0.1", 0)
            stack.callback(server.close)
            address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
            keepalive = Keepalive(seconds=0.1, without_calls=without_calls)
            channel = await stack.enter_async_context(open_channel(address, keepalive=keepalive))
            await asyncio.wait_for(channel.channel_ready(), 10)
        await asyncio.wait_for(pinged_often.wait(), 10)

    await asyncio.gather(*filter(None, connections))
    assert "quiet" not in pings


def test_servers_of_others_are_pinged_as_seldom_as_grpc_demands() -> None:
    assert ANY_SERVERS.seconds > 300
    assert not ANY_SERVERS.without_calls


async def test_pauses_grow_to_a_maximum_however_many(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []

    async def note(seconds: float) -> None:
        pauses.append(seconds)

    async def fail() -> None:
        raise failures.unavailable("down")

    monkeypatch.setattr("rlhf.channel.asyncio.sleep", note)
    policy = RetryPolicy(initial=0.5, maximum=4, multiplier=2, jitter=0.25, attempts=3000)
    with pytest.raises(RpcFailure):
        await call_with_retry(fail, policy=policy, what="server")

    assert len(pauses) == 2999
    for pause, middle in zip(pauses, [0.5, 1, 2, *[4] * 2996], strict=True):
        assert 0.75 * middle <= pause <= 1.25 * middle
    assert len(set(pauses)) > 2900


async def test_waiting_ends_when_the_service_is_ready(serve: Serve) -> None:
    async with serve() as served:
        served.server.set_serving(SERVICE, False)
        waits: list[Waiting] = []

        def ready_after_two(wait: Waiting) -> None:
            waits.append(wait)
            if len(waits) == 2:
                served.server.set_serving(SERVICE, True)

        await wait_until_ready(
            served.channel, SERVICE, what="policy server", target="p:1", timeout=10, on_wait=ready_after_two
        )

    assert [(wait.on, wait.target) for wait in waits] == [("policy server", "p:1")] * 2
    assert "NOT_SERVING" in waits[0].reason


@pytest.mark.parametrize(("service", "reason"), [("no.Service", "does not know no.Service"), (SERVICE, "NOT_SERVING")])
async def test_waiting_in_vain_ends_with_on_whom_and_why(serve: Serve, service: str, reason: str) -> None:
    async with serve() as served:
        served.server.set_serving(SERVICE, False)
        await served.channel.channel_ready()
        message = f"policy server p:1 was not ready within 2 seconds: .*{reason}"
        with pytest.raises(TimeoutError, match=message):
            await wait_until_ready(served.channel, service, what="policy server", target="p:1", timeout=2)


async def test_waiting_for_nobody_says_that_nobody_is_there() -> None:
    async with open_channel("127.0.0.1:1") as channel:
        with pytest.raises(TimeoutError, match=r"UNAVAILABLE.*refused"):
            await wait_until_ready(channel, "", what="server", timeout=3)


async def test_a_server_without_health_is_told_at_once() -> None:
    server = grpc.aio.server()
    ScriptedServicer().add_to(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with open_channel(f"127.0.0.1:{port}") as channel:
            with pytest.raises(RpcFailure, match="UNIMPLEMENTED"):
                await wait_until_ready(channel, "", what="server", timeout=30)
    finally:
        await server.stop(None)


async def test_a_wait_that_nobody_listens_to_is_logged_but_not_every_time(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        async with serve({"down": lambda: failures.unavailable("loading")}) as served:
            with pytest.raises(RpcFailure):
                await call_with_retry(
                    lambda: served.stub.unary_unary({"raise": "down"}),
                    policy=RetryPolicy(initial=0.001, attempts=5),
                    what="reward server",
                    target="r:1",
                )

    said = [record.getMessage() for record in caplog.records if "waiting" in record.getMessage()]
    assert len(said) == 1
    assert "waiting for reward server r:1" in said[0]
    assert "loading" in said[0]


def test_metadata_holds_what_is_given() -> None:
    assert call_metadata() == ()
    assert call_metadata(run_id="a b", step=0) == (("x-rlhf-run-id", "a b"), ("x-rlhf-step", "0"))
    assert call_metadata(request_id="ü\n") == (("x-request-id", "%C3%BC%0A"),)
