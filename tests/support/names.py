"""A name server that knows one name."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_A, _IN = 1, 1


@contextmanager
def name_server(*addresses: str) -> Iterator[str]:
    """Where a DNS server listens (host:port, UDP) that gives each name these IPv4 addresses, and no other records."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=_serve, args=(server, addresses))
        thread.start()
        host, port = server.getsockname()
        try:
            yield f"{host}:{port}"
        finally:
            # An empty datagram ends it.
            server.sendto(b"", server.getsockname())
            thread.join()


def _serve(server: socket.socket, addresses: tuple[str, ...]) -> None:
    while True:
        query, sender = server.recvfrom(4096)
        if not query:
            return
        server.sendto(_answer(query, addresses), sender)


def _answer(query: bytes, addresses: tuple[str, ...]) -> bytes:
    """The reply of RFC 1035: the header, the question as it came, and an A record for each address."""
    end = query.index(b"\0", 12) + 5
    question = query[12:end]
    kind, _ = struct.unpack("!HH", question[-4:])
    known = addresses if kind == _A else ()
    header = query[:2] + struct.pack("!HHHHH", 0x8180, 1, len(known), 0, 0)
    # 0xC00C points back at the name in the question.
    records = (struct.pack("!HHHIH", 0xC00C, _A, _IN, 0, 4) + socket.inet_aton(address) for address in known)
    return header + question + b"".join(records)
