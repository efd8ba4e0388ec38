from __future__ import annotations

import asyncio
import logging
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from rlhf import tracing
from rlhf.failures import invalid_argument
from rlhf.logs import bound_context
from rlhf.security.config import CredentialsError
from rlhf.tracing import exporting
from tests.rlhf.conftest import Serve, Served, failure_of
from tests.support.certificates import Authority
from tests.support.otlp import SOON, Receiver, Span, receiver
from tests.support.processes import wait_for
from tests.support.scripted_server import SERVICE

SERVER, CLIENT = 2, 3
UNARY = f"{SERVICE}/UnaryUnary"
STREAM = f"{SERVICE}/StreamUnary"
LOST = "traces can't be delivered and are lost; all else goes on"


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    """What a receiver got; all of it once the `exporting` that tells it has ended."""
    for name, value in SOON.items():
        monkeypatch.setenv(name, value)
    # Nothing is to be lost because this machine is busy.
    monkeypatch.setattr("rlhf.otlp._FLUSH_SECONDS", 30.0)
    with receiver() as told:
        yield told


@asynccontextmanager
async def traced(told: Receiver, serve: Serve, **overrides: object) -> AsyncIterator[Served]:
    """A server and its client in this process, which sends its spans by the end of the block."""
    with exporting(told.endpoint, service="a-process"):
        async with serve(**overrides) as served:
            yield served


def of_kind(told: Receiver, kind: int) -> list[Span]:
    return [span for span in told.spans if span.kind == kind]


@pytest.mark.parametrize("method", ["unary_unary", "stream_unary"])
async def test_a_call_is_a_child_of_the_span_around_and_the_servers_part_of_the_call(
    told: Receiver, serve: Serve, method: str
) -> None:
    async with traced(told, serve) as served:
        with bound_context(run_id="a run", step=3), tracing.span("work", samples=2):
            await getattr(served.stub, method)({} if method == "unary_unary" else iter([{}]))

    (work,) = told.named("work", run_id="a run", step=3, samples=2)
    (client,), (server,) = of_kind(told, CLIENT), of_kind(told, SERVER)
    assert told.ancestors(server) == [client, work]
    assert client.name == server.name == (UNARY if method == "unary_unary" else STREAM)
    assert server.attributes["rpc.response.status_code"] == "OK"


async def test_a_foreign_clients_trace_goes_on_in_the_server(
    told: Receiver, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    trace_id, span_id = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    async with traced(told, serve) as served:
        await served.stub.unary_unary({}, metadata=(("traceparent", f"00-{trace_id}-{span_id}-01"),))
        for useless in ("00-not-a-trace", "0" * 8000):
            await served.stub.unary_unary({}, metadata=(("traceparent", useless),))

    first, *others = of_kind(told, SERVER)
    assert (first.trace_id, first.parent_id) == (trace_id, span_id)
    assert [span.parent_id for span in others] == ["", ""]
    assert not caplog.records


async def test_polling_and_probes_begin_no_traces(told: Receiver, serve: Serve) -> None:
    async with traced(told, serve) as served:
        await served.stub.unary_unary({})
        health = health_pb2_grpc.HealthStub(served.channel)  # type: ignore[no-untyped-call]
        await health.Check(health_pb2.HealthCheckRequest(service=SERVICE))

    assert of_kind(told, CLIENT) == []
    assert [span.name for span in of_kind(told, SERVER)] == [UNARY]


async def test_a_cancelled_call_is_cancelled_in_the_server_too(told: Receiver, serve: Serve) -> None:
    async with traced(told, serve) as served:
        with tracing.span("work"):
            call = asyncio.ensure_future(_awaited(served.stub.unary_unary({"wait_seconds": 60})))
        await served.servicer.began.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

        await asyncio.to_thread(wait_for, lambda: served.servicer.cut, within=10, what="cut handler")

    assert served.servicer.cut == ["CancelledError"]
    assert [span.attributes["rpc.response.status_code"] for span in told.named(UNARY)] == ["CANCELLED"] * 2


async def test_a_failure_is_told_by_its_code_or_type_and_without_its_words(told: Receiver, serve: Serve) -> None:
    failures = {"mistake": lambda: invalid_argument("a.field", "a secret"), "fault": lambda: KeyError("a secret")}
    async with traced(told, serve, failures=failures) as served:
        with tracing.span("calls"):
            for script in failures:
                await failure_of(served.stub.unary_unary({"raise": script}))
        with pytest.raises(KeyError), tracing.span("work"):
            raise KeyError("a secret")

    assert [span.failed for span in of_kind(told, CLIENT)] == ["INVALID_ARGUMENT", "INTERNAL"]
    assert [span.failed for span in of_kind(told, SERVER)] == ["", "INTERNAL"]
    assert told.named("work")[0].failed == "KeyError"
    assert b"a secret" not in b"".join(told.requests)


def test_work_done_elsewhere_is_a_child_of_what_it_was_asked_for_in(told: Receiver) -> None:
    with exporting(told.endpoint, service="a-process"):
        with tracing.span("asked"):
            asked = tracing.here()
        with tracing.continuing(asked), tracing.span("done"):
            pass
        with tracing.span("made", parent=asked):
            pass

    assert [told.ancestors(told.named(name)[0])[0].name for name in ("done", "made")] == ["asked", "asked"]


def test_a_receiver_that_is_not_there_is_told_of_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf.otlp._FLUSH_SECONDS", 0.5)
    with exporting("http://127.0.0.1:1", service="a-process"):
        for _ in range(600):  # more than a batch
            with tracing.span("lost"):
                pass

    assert [record.getMessage().partition(" otlp")[0] for record in caplog.records] == [LOST]


def test_a_receiver_that_never_answers_does_not_hold_a_process_up(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf.otlp._FLUSH_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with exporting(endpoint, service="a-process"), tracing.span("lost"):
            pass

    assert len(caplog.records) == 1


def test_a_receiver_that_comes_back_is_told_the_rest(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", SOON["OTEL_BSP_SCHEDULE_DELAY"])
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    with receiver() as gone:
        address = gone.address
    with exporting(f"http://{address}", service="a-process"):
        with tracing.span("lost"):
            pass
        wait_for(lambda: LOST in caplog.text, within=20, what="word of lost traces")

        def delivered() -> bool:
            # The connection is tried again when it is, and not for every span.
            with tracing.span("kept"):
                pass
            return "traces are delivered again" in caplog.text

        with receiver(address) as back:
            wait_for(delivered, within=30, what="word of delivery")

    assert back.named("kept")


def test_https_is_tls_with_the_authority_that_the_environment_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.issue("localhost", "127.0.0.1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_CERTIFICATE", str(authority.bundle))
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20a-token")
    monkeypatch.setattr("rlhf.otlp._FLUSH_SECONDS", 30.0)
    credentials = grpc.ssl_server_credentials([(key.read_bytes(), cert.read_bytes())])
    with (
        receiver(credentials=credentials) as told,
        exporting(f"https://{told.address}", service="a-process"),
        tracing.span("work"),
    ):
        pass

    assert [(span.service, span.name) for span in told.spans] == [("a-process", "work")]
    assert told.headers["authorization"] == "Bearer a-token"


def test_a_token_is_not_sent_to_another_machine_in_plaintext(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20a-token")
    with pytest.raises(CredentialsError, match="OTEL_EXPORTER_OTLP_HEADERS is sent to http://collector:4317 over TLS"):
        exporting("http://collector:4317", service="a-process").__enter__()


def test_without_an_endpoint_nothing_is_traced_and_opentelemetry_stays_out() -> None:
    code = (
        "import sys, rlhf.server, rlhf.channel; from rlhf import tracing\n"
        "with tracing.exporting(None, service='a'), tracing.span('a') as span, tracing.continuing(tracing.here()):\n"
        "    print(span.context, tracing.exemplar(), tracing.client_interceptors(), *sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout

    assert printed.startswith("None None ()")
    assert "opentelemetry" not in printed


def test_without_the_extra_an_endpoint_names_it() -> None:
    code = (
        "import sys; sys.modules['opentelemetry'] = None; from rlhf import tracing\n"
        "tracing.exporting('http://127.0.0.1:1', service='a').__enter__()"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert ended.returncode == 78
    assert "pip install 'rlhf-services[tracing]'" in ended.stderr


async def _awaited(call: grpc.aio.Call) -> object:
    return await call
