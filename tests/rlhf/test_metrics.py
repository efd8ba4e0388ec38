from __future__ import annotations

import urllib.request

import grpc
import pytest
from prometheus_client import CollectorRegistry, Gauge

from rlhf.metrics import GrpcServerMetrics, MethodName, serve_metrics

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
