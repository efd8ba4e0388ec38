from __future__ import annotations

import asyncio
import json
import os
import signal
import urllib.request
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc._cython import cygrpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from rlhf.channel import open_channel, wait_until_ready
from rlhf.server import BindError
from tests.rlhf.conftest import Serve, failure_of, result_of
from tests.support.http2 import Http2Client
from tests.support.processes import StartProcess, wait_for
from tests.support.scripted_server import SERVICE, Stub

MODULE = "tests.support.scripted_server"
Status = health_pb2.HealthCheckResponse.ServingStatus


async def _health(channel: grpc.aio.Channel, service: str) -> str:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
    return Status.Name(answer.status)


async def test_a_service_is_ready_when_it_says_so_and_the_process_alive_all_along(serve: Serve) -> None:
    async with serve() as served:
        assert await _health(served.channel, SERVICE) == "SERVING"

        served.server.set_serving(SERVICE, False)

        assert await _health(served.channel, SERVICE) == "NOT_SERVING"
        assert await _health(served.channel, "") == "SERVING"


async def test_a_watcher_sees_a_service_become_ready(serve: Serve) -> None:
    async with serve() as served:
        served.server.set_serving(SERVICE, False)
        stub: Any = health_pb2_grpc.HealthStub(served.channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE), timeout=10)
        seen = [Status.Name((await watch.read()).status)]
        served.server.set_serving(SERVICE, True)
        seen.append(Status.Name((await watch.read()).status))
        watch.cancel()

    assert seen == ["NOT_SERVING", "SERVING"]


async def test_a_watcher_that_takes_nothing_holds_up_no_news_and_no_drain(start_process: StartProcess) -> None:
    process = start_process(MODULE, "--drain-seconds", "0.2", "--grace-seconds", "0.2")
    await asyncio.to_thread(process.wait_serving, SERVICE)
    with Http2Client(process.address, takes=0) as hostile:
        async with open_channel(process.address) as channel:
            for stream, service in ((1, SERVICE), (3, "")):
                hostile.begin(stream, "/grpc.health.v1.Health/Watch")
                hostile.send_message(stream, health_pb2.HealthCheckRequest(service=service).SerializeToString())
            begun = 'grpc_server_started_total{grpc_method="Watch",grpc_service="grpc.health.v1.Health"'
            await asyncio.to_thread(wait_for, lambda: begun in process.metrics_text(), within=20, what="watch")
            await _health(channel, SERVICE)  # by then the first answers wait for a window
            call = Stub(channel).unary_unary({"wait_seconds": 600}, timeout=900)
            process.signal(signal.SIGTERM)
            async with asyncio.timeout(30):
                error = await failure_of(call)

        assert error.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
        assert await asyncio.to_thread(process.wait_exit) == 0


async def test_health_does_not_know_a_service_that_is_not_there(serve: Serve) -> None:
    async with serve() as served:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _health(served.channel, "no.Service")

    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_reflection_lists_the_services(serve: Serve) -> None:
    async with serve() as served:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(served.channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        [answer] = await result_of(stub.ServerReflectionInfo(iter([request])))

    names = {service.name for service in answer.list_services_response.service}
    assert names == {SERVICE, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}


async def test_messages_are_bounded_both_ways(serve: Serve) -> None:
    async with serve(max_message_bytes=100_000) as served:
        fits = {"text": "a" * 90_000}
        assert await served.stub.unary_unary(fits) == fits
        error = await failure_of(served.stub.unary_unary({"text": "a" * 110_000}))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED

        async with open_channel(served.server.address, max_message_bytes=50_000) as narrow:
            assert (await failure_of(Stub(narrow).unary_unary(fits))).code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_messages_above_grpcs_own_limit_pass(serve: Serve) -> None:
    large = {"text": "a" * (6 << 20)}
    async with serve() as served:
        assert await served.stub.unary_unary(large) == large


async def test_two_servers_on_one_port_are_an_error_that_names_it(serve: Serve) -> None:
    async with serve() as first:
        with pytest.raises(BindError, match=first.server.address):
            async with serve(listen=first.server.address):
                pass


async def test_a_metrics_port_that_is_taken_is_an_error_that_names_it(serve: Serve) -> None:
    async with serve(metrics_port="auto") as first:
        assert first.server.metrics_url is not None
        port = int(first.server.metrics_url.split(":")[2].split("/")[0])
        with pytest.raises(BindError, match=f"127.0.0.1:{port}"):
            async with serve(metrics_port=port):
                pass


async def test_an_address_that_is_none_is_an_error_that_names_it(serve: Serve) -> None:
    with pytest.raises(BindError, match=r"no-such-host\.invalid:1"):
        async with serve(listen="no-such-host.invalid:1"):
            pass


async def test_a_wildcard_address_is_announced_as_one_that_can_be_reached(serve: Serve) -> None:
    async with serve(listen="0.0.0.0:0") as served:
        assert served.server.address.startswith("127.0.0.1:")
        assert await served.stub.unary_unary({"a": 1}) == {"a": 1}


async def test_a_server_listens_on_a_unix_socket(serve: Serve, tmp_path: Path) -> None:
    async with serve(listen=f"unix:{tmp_path}/s") as served:
        assert await served.stub.unary_unary({"a": 1}) == {"a": 1}


async def test_the_metrics_endpoint_shows_the_calls_and_ends_with_the_server(serve: Serve) -> None:
    async with serve(metrics_port="auto") as served:
        await served.stub.unary_unary({})
        url = served.server.metrics_url
        assert url is not None
        text = await asyncio.to_thread(_get, url)

    labels = f'grpc_method="UnaryUnary",grpc_service="{SERVICE}",grpc_type="UNARY"'
    assert f"grpc_server_started_total{{{labels}}} 1.0" in text
    assert f'grpc_server_handled_total{{grpc_code="OK",{labels}}} 1.0' in text
    assert f"grpc_server_msg_received_total{{{labels}}} 1.0" in text
    assert f"grpc_server_msg_sent_total{{{labels}}} 1.0" in text
    assert f"grpc_server_handling_seconds_count{{{labels}}} 1.0" in text
    assert served.server.metrics_url is None
    with pytest.raises(OSError, match="refused"):
        _get(url)


async def test_the_endpoint_file_is_there_while_the_server_is(serve: Serve, tmp_path: Path) -> None:
    file = tmp_path / "folder" / "endpoint.json"
    async with serve(endpoint_file=file, metrics_port="auto") as served:
        content = json.loads(file.read_text())
        assert content == {
            "pid": os.getpid(),
            "address": served.server.address,
            "metrics_url": served.server.metrics_url,
            "health_address": None,
        }
        assert [each.name for each in file.parent.iterdir()] == ["endpoint.json"]

    assert not file.exists()


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=5) as answer:
        text: str = answer.read().decode()
        return text


async def test_a_drain_finishes_the_call_in_flight_and_exits_0(start_process: StartProcess) -> None:
    process = start_process(MODULE, "--drain-seconds", "0.3")
    await asyncio.to_thread(process.wait_serving, SERVICE)
    async with open_channel(process.address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        watches = [stub.Watch(health_pb2.HealthCheckRequest(service=service)) for service in (SERVICE, "")]
        assert [Status.Name((await watch.read()).status) for watch in watches] == ["SERVING"] * 2
        call = Stub(channel).unary_unary({"wait_seconds": 1, "n": 1}, timeout=20)
        await asyncio.to_thread(wait_for, lambda: "acting" in process.log_text(), within=10, what="call")
        process.signal(signal.SIGTERM)
        assert [Status.Name((await watch.read()).status) for watch in watches] == ["NOT_SERVING"] * 2
        assert await call == {"wait_seconds": 1, "n": 1}

    assert await asyncio.to_thread(process.wait_exit) == 0


async def test_a_watcher_of_health_does_not_hold_up_a_drain(start_process: StartProcess) -> None:
    process = start_process(MODULE, "--drain-seconds", "0.2", "--grace-seconds", "600")
    await asyncio.to_thread(process.wait_serving, SERVICE)
    async with open_channel(process.address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        seen = [Status.Name((await watch.read()).status)]
        process.signal(signal.SIGTERM)
        seen.append(Status.Name((await watch.read()).status))
        error = await failure_of(watch.read())

    assert seen == ["SERVING", "NOT_SERVING"]
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert await asyncio.to_thread(process.wait_exit, 10) == 0


async def test_a_drain_cuts_what_outlasts_the_grace(start_process: StartProcess) -> None:
    process = start_process(MODULE, "--drain-seconds", "0", "--grace-seconds", "0.2")
    await asyncio.to_thread(process.wait_serving, SERVICE)
    async with open_channel(process.address) as channel:
        call = Stub(channel).unary_unary({"wait_seconds": 60}, timeout=90)
        await asyncio.to_thread(wait_for, lambda: "acting" in process.log_text(), within=10, what="call")
        process.signal(signal.SIGTERM)
        error = await failure_of(call)

    assert error.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
    assert await asyncio.to_thread(process.wait_exit) == 0


async def test_a_second_signal_ends_the_drain_at_once(start_process: StartProcess) -> None:
    process = start_process(MODULE, "--drain-seconds", "0", "--grace-seconds", "600")
    await asyncio.to_thread(process.wait_serving, SERVICE)
    async with open_channel(process.address) as channel:
        call = Stub(channel).unary_unary({"wait_seconds": 600}, timeout=900)
        await asyncio.to_thread(wait_for, lambda: "acting" in process.log_text(), within=10, what="call")
        process.signal(signal.SIGINT)
        await asyncio.to_thread(wait_for, lambda: "draining" in process.log_text(), within=10, what="drain")
        process.signal(signal.SIGINT)
        await failure_of(call)

    assert await asyncio.to_thread(process.wait_exit, 10) == 0


async def test_a_killed_server_comes_back_on_its_port(start_process: StartProcess) -> None:
    first = start_process(MODULE)
    await asyncio.to_thread(first.wait_serving, SERVICE)
    address = first.address
    async with open_channel(address) as channel:
        await Stub(channel).unary_unary({})
        first.kill()
        start_process(MODULE, listen=address)
        await wait_until_ready(channel, SERVICE, what="server", timeout=30)
        assert await Stub(channel).unary_unary({"a": 1}) == {"a": 1}


async def test_grpc_knows_the_name_of_every_option(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ignores a name that it doesn't know, without a word."""
    options: list[tuple[str, object]] = []
    make_server, make_channel = grpc.aio.server, grpc.aio.insecure_channel

    def server(**arguments: Any) -> grpc.aio.Server:
        options.extend(arguments["options"])
        return make_server(**arguments)

    def channel(target: str, **arguments: Any) -> grpc.aio.Channel:
        options.extend(arguments["options"])
        return make_channel(target, **arguments)

    monkeypatch.setattr(grpc.aio, "server", server)
    monkeypatch.setattr(grpc.aio, "insecure_channel", channel)
    async with serve() as served:
        await served.stub.unary_unary({})

    library = await asyncio.to_thread(Path(cygrpc.__file__).read_bytes)
    names = {name for name, _ in options}
    assert len(names) > 10
    assert {name for name in names if name.encode() + b"\0" not in library} == set()
