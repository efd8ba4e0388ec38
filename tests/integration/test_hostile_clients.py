"""Clients that mean harm fill no memory, and others are served meanwhile."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from rlhf.reward.v1 import reward_pb2, reward_pb2_grpc
from tests.integration.secured import access_file, bearer, code_of, token_of
from tests.integration.training import metric
from tests.support.http2 import Http2Client, ping
from tests.support.memory import private_bytes
from tests.support.processes import ProcessUnderTest, StartProcess, process_factory, wait_for

SCORE = "/rlhf.reward.v1.RewardService/Score"
MEGABYTE = 1 << 20
MAX_MESSAGE = 4 * MEGABYTE
# 8 requests of one caller at once, each held by gRPC and then in Python, and as much again for all else.
MAX_GROWTH = 2 * 2 * 8 * MAX_MESSAGE
RECEIVE_SECONDS = 3.0


class Served:
    """A reward server with an access file, in plaintext on loopback, and a client of it that behaves."""

    def __init__(self, folder: Path, start: StartProcess) -> None:
        self.process: ProcessUnderTest = start(
            "reward_server",
            *("--reward", "length", "--reward-options", "{target: 4}", "--access-file", str(access_file(folder))),
            *("--max-message-bytes", str(MAX_MESSAGE), "--max-connections", "100"),
            *("--receive-seconds", str(RECEIVE_SECONDS)),
        )
        self.process.wait_serving("rlhf.reward.v1.RewardService")
        self.address = self.process.address
        self._scored = 0
        with self.good() as score:
            self.require_served(score)

    @contextlib.contextmanager
    def good(self) -> Iterator[Callable[[], str]]:
        """A connection whose every call scores one new sample; the status."""
        with grpc.insecure_channel(self.address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            stub = reward_pb2_grpc.RewardServiceStub(channel)

            def score() -> str:
                self._scored += 1
                name = str(self._scored)
                sample = reward_pb2.Sample(sample_id=name, group_id=name, group_size=1, completion="four")
                return code_of(stub.Score, reward_pb2.ScoreRequest(run_id="r", samples=[sample]), token_of("scorer"))

            yield score

    def require_served(self, score: Callable[[], str]) -> None:
        """Twenty calls in a row are answered."""
        assert [score() for _ in range(20)] == ["OK"] * 20

    def resident_bytes(self) -> int:
        """What the process holds."""
        return private_bytes(self.process.pid)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("hostile")
    with process_factory(folder) as start:
        yield Served(folder, start)


@pytest.fixture
def bounded(served: Served) -> Iterator[Callable[[], str]]:
    """A client that behaves, connected before the others come; at the end the server must not have grown."""
    before = served.resident_bytes()
    with served.good() as score:
        served.require_served(score)
        yield score
        served.require_served(score)
    assert served.resident_bytes() - before < MAX_GROWTH


def headers(token: str | None) -> tuple[tuple[str, str], ...]:
    return bearer(token)


def test_large_requests_that_never_end_are_taken_in_a_few_at_a_time(served: Served, bounded: Callable[[], str]) -> None:
    """100 requests, each all but its last bytes: 400 MB, were they all taken in."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Http2Client(served.address)) for _ in range(10)]
        taken: list[int] = []

        def send(client: Http2Client, stream: int) -> None:
            with contextlib.suppress(OSError):
                client.begin(stream, SCORE, *headers(token_of("admin")))
                taken.append(client.send_message_part(stream, MAX_MESSAGE, MAX_MESSAGE - 100, within=1.0))

        senders = [
            threading.Thread(target=lambda c=client: [send(c, 1 + 2 * number) for number in range(10)])  # type: ignore[misc]
            for client in clients
        ]
        for sender in senders:
            sender.start()
        while any(sender.is_alive() for sender in senders):
            assert bounded() == "OK"
        assert len(taken) == 100
        assert sum(taken) < 100 * MAX_MESSAGE / 2
    late = metric(served.process, "grpc_server_handled_total", grpc_method="Score", grpc_code="UNAVAILABLE")
    assert late > 0, "requests that take too long are ended"


def test_what_strangers_send_is_not_even_read(served: Served, bounded: Callable[[], str]) -> None:
    with Http2Client(served.address) as client:
        for number in range(20):
            client.begin(1 + 2 * number, SCORE, *headers("a-wrong-token-0123456789"))
            assert client.send_message_part(1 + 2 * number, MAX_MESSAGE, MAX_MESSAGE, within=0.5) < MEGABYTE
        assert bounded() == "OK"


def test_a_flood_of_pings_ends_the_connection(served: Served, bounded: Callable[[], str]) -> None:
    with Http2Client(served.address) as client:
        # One at a time: bytes that cross with the server's last word would make the kernel throw that away.
        ended = any(_ping_ends(client) for _ in range(1000))
        assert ended
        assert client.goaway == b"too_many_pings"
    assert bounded() == "OK"


def test_huge_metadata_are_refused(served: Served, bounded: Callable[[], str]) -> None:
    with grpc.insecure_channel(served.address) as channel:
        call = reward_pb2_grpc.RewardServiceStub(channel).GetRewardInfo
        with pytest.raises(grpc.RpcError) as refused:
            call(
                reward_pb2.GetRewardInfoRequest(),
                metadata=(*bearer(token_of("admin")), ("x-filler", "a" * MEGABYTE)),
                timeout=20,
            )
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert bounded() == "OK"


def test_headers_that_never_end_end_the_call(served: Served, bounded: Callable[[], str]) -> None:
    with Http2Client(served.address) as client:
        with contextlib.suppress(OSError):
            client.begin(1, SCORE, *((f"x-{number}", "a" * 60_000) for number in range(100)))
        assert bounded() == "OK"


def test_a_compressed_request_that_unfolds_beyond_the_limit_is_refused(
    served: Served, bounded: Callable[[], str]
) -> None:
    bomb = reward_pb2.ScoreRequest(run_id="\0" * (200 * MEGABYTE))
    with grpc.insecure_channel(served.address, options=[("grpc.max_send_message_length", -1)]) as channel:
        score = reward_pb2_grpc.RewardServiceStub(channel).Score
        code = code_of(score, bomb, token_of("admin"), compression=grpc.Compression.Gzip)
    assert code == "RESOURCE_EXHAUSTED"


def test_connections_on_which_nothing_is_said_are_ended_and_too_many_are_not_let_in(
    served: Served, bounded: Callable[[], str]
) -> None:
    with contextlib.ExitStack() as stack:
        host, _, port = served.address.rpartition(":")
        silent = [stack.enter_context(socket.create_connection((host, int(port)), timeout=20)) for _ in range(300)]
        assert bounded() == "OK"
        ended = wait_for(lambda: [each for each in silent if _is_ended(each)] or None, within=10, what="ended one")
        assert ended, "beyond the limit a connection is ended at once"
        wait_for(lambda: all(map(_is_ended, silent)), within=40, what="end of all silent connections")
        with served.good() as score:
            served.require_served(score)


def test_calls_that_are_begun_and_reset_at_once_do_no_harm(served: Served, bounded: Callable[[], str]) -> None:
    with Http2Client(served.address) as client:
        with contextlib.suppress(OSError):
            for number in range(3000):
                client.begin(1 + 2 * number, SCORE, *headers(token_of("admin")))
                client.send(_reset(1 + 2 * number))
        assert bounded() == "OK"


def _ping_ends(client: Http2Client) -> bool:
    """Whether the connection ends at, or before, one more ping."""
    with contextlib.suppress(OSError):
        client.send(ping())
    return client.wait_closed(within=0.02)


def _is_ended(connection: socket.socket) -> bool:
    """Whether the other side has hung up, after whatever it said."""
    connection.setblocking(False)
    try:
        while connection.recv(4096):
            pass
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _reset(stream: int) -> bytes:
    cancel: Any = (8).to_bytes(4, "big")
    return len(cancel).to_bytes(3, "big") + bytes([3, 0]) + stream.to_bytes(4, "big") + cancel
