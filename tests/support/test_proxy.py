"""The proxy does to a connection what its tests say."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.support.processes import wait_for
from tests.support.proxy import Proxy

LARGE = bytes(range(256)) * 64


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    """Before a server that echoes."""
    listener = socket.create_server(("127.0.0.1", 0))

    def echo(connection: socket.socket) -> None:
        with connection, contextlib.suppress(ConnectionResetError):
            while piece := connection.recv(65536):
                connection.sendall(piece)

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=echo, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    with Proxy(f"127.0.0.1:{listener.getsockname()[1]}") as proxy:
        yield proxy
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def connect(proxy: Proxy) -> socket.socket:
    host, _, port = proxy.address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=10)


def echoed(connection: socket.socket, data: bytes) -> bytes:
    connection.sendall(data)
    answer = b""
    while len(answer) < len(data):
        answer += connection.recv(65536)
    return answer


def test_what_is_sent_comes_through_both_ways(proxy: Proxy) -> None:
    with connect(proxy) as connection:
        assert echoed(connection, LARGE) == LARGE


def test_a_stall_holds_everything_back_without_ending_the_connection(proxy: Proxy) -> None:
    with connect(proxy) as connection:
        echoed(connection, b"before")
        proxy.stall()
        connection.sendall(b"held")
        connection.settimeout(0.2)
        with pytest.raises(TimeoutError):
            connection.recv(4)
        connection.settimeout(10)
        proxy.heal()
        assert connection.recv(4) == b"held"


def test_a_stall_begins_after_as_many_bytes_as_asked(proxy: Proxy) -> None:
    proxy.stall(after=100)
    with connect(proxy) as connection:
        assert echoed(connection, b"x" * 100) == b"x" * 100
        assert not proxy.stalled
        connection.sendall(b"y")
        wait_for(lambda: proxy.stalled, within=10, what="stall")


def test_a_cut_resets_the_connections_there_are_and_takes_new_ones(proxy: Proxy) -> None:
    with connect(proxy) as connection:
        echoed(connection, b"before")
        assert proxy.cut() == 1
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    with connect(proxy) as connection:
        assert echoed(connection, b"after") == b"after"


def test_nobody_behind_it_looks_like_a_reset(proxy: Proxy) -> None:
    proxy.target = "127.0.0.1:1"
    # The reset may come as early as the answer to the connecting.
    with pytest.raises(ConnectionResetError), connect(proxy) as connection:
        connection.recv(1)


def test_damage_turns_one_bit_of_what_is_named_as_often_as_asked(proxy: Proxy) -> None:
    proxy.damage(b"fragile", times=1)
    with connect(proxy) as connection:
        assert echoed(connection, b"sturdy") == b"sturdy"
        assert echoed(connection, b"so fragile.") == b"so fra" + bytes([ord("g") ^ 1]) + b"ile."
        assert proxy.damages == 0
        assert echoed(connection, b"so fragile.") == b"so fragile."


def test_a_slow_line_takes_its_time(proxy: Proxy) -> None:
    proxy.delay_seconds = 0.2
    proxy.bytes_per_second = 1000
    with connect(proxy) as connection:
        began = time.monotonic()
        echoed(connection, b"x" * 100)
        assert time.monotonic() - began >= 0.1 + 0.1 + 0.2
