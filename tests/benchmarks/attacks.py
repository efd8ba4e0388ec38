"""A hostile client as a process, until it is killed: python -m tests.benchmarks.attacks ADDRESS KIND TOKEN."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping

from tests.support.http2 import Http2Client, ping

SCORE = "/rlhf.reward.v1.RewardService/Score"
_ROUND_SECONDS = 0.2


def slow_requests(address: str, token: str) -> None:
    """Fifty requests of 4 MB that all but end, kept open for a while."""
    with Http2Client(address) as client:
        for number in range(50):
            client.begin(1 + 2 * number, SCORE, ("authorization", f"Bearer {token}"))
            client.send_message_part(1 + 2 * number, 4 << 20, (4 << 20) - 1, within=0.01)
        time.sleep(5 * _ROUND_SECONDS)


def strangers(address: str, token: str) -> None:
    """Twenty large requests with a wrong token."""
    with Http2Client(address) as client:
        for number in range(20):
            client.begin(1 + 2 * number, SCORE, ("authorization", f"Bearer not-{token}"))
            client.send_message_part(1 + 2 * number, 4 << 20, 4 << 20, within=0.01)


def pings(address: str, token: str) -> None:
    """Pings until the server hangs up."""
    with Http2Client(address) as client:
        for _ in range(200):
            client.send(ping())
        client.wait_closed(1)


def silence(address: str, token: str) -> None:
    """Fifty connections on which nothing is said."""
    host, _, port = address.rpartition(":")
    with contextlib.ExitStack() as stack:
        for _ in range(50):
            stack.enter_context(socket.create_connection((host, int(port)), timeout=10))
        time.sleep(5 * _ROUND_SECONDS)


def metadata(address: str, token: str) -> None:
    """A megabyte of headers."""
    with Http2Client(address) as client:
        client.begin(1, SCORE, *((f"x-{number}", "a" * 50_000) for number in range(20)))


ATTACKS: Mapping[str, Callable[[str, str], None]] = {
    "slow requests": slow_requests,
    "strangers' large requests": strangers,
    "pings": pings,
    "silent connections": silence,
    "huge metadata": metadata,
}


def main() -> None:
    """Attack for ever, a round at a time; at the lowest priority, so that the server is measured and not the CPU."""
    address, kind, token = sys.argv[1:]
    os.nice(19)
    while True:
        with contextlib.suppress(OSError):
            ATTACKS[kind](address, token)
        time.sleep(_ROUND_SECONDS)


if __name__ == "__main__":
    main()
