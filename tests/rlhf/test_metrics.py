from __future__ import annotations

import asyncio
import time
import urllib.error
import urllib.request

import grpc
import pytest
from prometheus_client import CollectorRegistry, Gauge

from rlhf.metrics import GrpcServerMetrics, MethodName, Pulse, serve_metrics

NAME = MethodName("UNARY", "a.Service", "Method")


def test_a_metrics_endpoint_serves_its_registry_until_closed() -> None:
    registry = CollectorRegistry()
    Gauge("some_gauge", "A gauge.", registry=registry).set(3)
    endpoint = serve_metrics("auto", registry)
    assert endpoint is not None

    with urllib.request.urlopen(endpoint.url, timeout=5) as answer:
        assert b"some_gauge 3.0" in answer.read()
    assert endpoint.url.startswith("http://127.0.0.1:")

    endpoint.close()
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(endpoint.url, timeout=5)


def livez(url: str) -> int:
    try:
        with urllib.request.urlopen(url.replace("/metrics", "/livez"), timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


async def test_livez_fails_when_the_event_loop_stands_still_and_not_when_it_waits() -> None:
    pulse = Pulse(limit=3.0)
    endpoint = serve_metrics("auto", CollectorRegistry(), pulse=pulse)
    assert endpoint is not None
    pulse.begin()

    await asyncio.sleep(3.1)  # longer than the limit, in which the loop turned
    assert await asyncio.to_thread(livez, endpoint.url) == 200
    time.sleep(3.1)  # noqa: ASYNC251 - the loop is to stand still
    assert livez(endpoint.url) == 503
    await asyncio.to_thread(endpoint.close)


def test_port_0_is_off() -> None:
    assert serve_metrics(0) is None


def test_a_wildcard_host_has_an_address_that_can_be_reached() -> None:
    endpoint = serve_metrics("auto", CollectorRegistry(), "0.0.0.0")
    assert endpoint is not None
    assert endpoint.url.startswith("http://127.0.0.1:")
    endpoint.close()


def test_a_port_that_is_taken_is_an_error_that_names_it() -> None:
    first = serve_metrics("auto", CollectorRegistry())
    assert first is not None
    port = int(first.url.split(":")[2].split("/")[0])

    with pytest.raises(OSError, match=f"127.0.0.1:{port}"):
        serve_metrics(port, CollectorRegistry())
    first.close()


def test_servers_of_one_registry_share_their_metrics() -> None:
    registry = CollectorRegistry()

    assert GrpcServerMetrics.of(registry) is GrpcServerMetrics.of(registry)
    assert GrpcServerMetrics.of(registry) is not GrpcServerMetrics.of(CollectorRegistry())


def test_a_call_that_ends_unforeseen_is_counted_as_unknown() -> None:
    registry = CollectorRegistry()
    with pytest.raises(KeyError), GrpcServerMetrics.of(registry).call(NAME):
        raise KeyError

    labels = {"grpc_type": "UNARY", "grpc_service": "a.Service", "grpc_method": "Method"}
    assert registry.get_sample_value("grpc_server_handled_total", {**labels, "grpc_code": "UNKNOWN"}) == 1
    assert registry.get_sample_value("grpc_server_handling_seconds_count", labels) == 1


def test_a_call_is_counted_under_the_code_it_is_given() -> None:
    registry = CollectorRegistry()
    with GrpcServerMetrics.of(registry).call(NAME) as call:
        call.code = grpc.StatusCode.OK

    labels = {"grpc_type": "UNARY", "grpc_service": "a.Service", "grpc_method": "Method", "grpc_code": "OK"}
    assert registry.get_sample_value("grpc_server_handled_total", labels) == 1
