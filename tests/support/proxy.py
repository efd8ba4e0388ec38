"""A TCP proxy to put between two processes: what a network does to them, a test does by it."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from types import TracebackType
from typing import Self

_PIECE = 16384
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Proxy:
    """Forwards connections to `target` ("host:port"), as a context; every attribute may change at any time.

    bytes_per_second, delay_seconds: each way of each connection, the second for each piece on its way back.
    """

    def __init__(self, target: str) -> None:
        self.target = target
        self.bytes_per_second = float("inf")
        self.delay_seconds = 0.0
        self.damages = 0
        """How often `damage` has still to be done."""
        self._fragile = b""
        self.passed = 0
        self._flows = threading.Event()
        self._flows.set()
        self._stall_after: int | None = None
        self._sockets: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"

    def damage(self, content: bytes, *, times: int) -> None:
        """Turn one bit in the middle of `content` the next so many times that it passes on its way there, unparted."""
        self._fragile, self.damages = content, times

    def stall(self, *, after: int = 0) -> None:
        """A partition: connections stay open, new ones are taken, and nothing comes through once `after` bytes have."""
        if after:
            self._stall_after = self.passed + after
        else:
            self._flows.clear()

    def heal(self) -> None:
        """What was held back comes through."""
        self._stall_after = None
        self._flows.set()

    @property
    def stalled(self) -> bool:
        """Whether nothing comes through."""
        return not self._flows.is_set()

    def cut(self) -> int:
        """Reset every connection (RST); returns how many pairs there were. New ones are forwarded."""
        cut = list(self._sockets)
        # All of them before the first ends: that closes its pair, which would say goodbye.
        for each in cut:
            with contextlib.suppress(OSError):
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        for each in cut:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RD)
        return len(cut) // 2

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.heal()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            host, _, port = self.target.rpartition(":")
            try:
                far = socket.create_connection((host, int(port)))
            except OSError:
                near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
                near.close()
                continue
            self._sockets |= {near, far}
            for source, sink, there in ((near, far, True), (far, near, False)):
                threading.Thread(target=self._forward, args=(source, sink, there), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket, there: bool) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(_PIECE):
                time.sleep(len(piece) / self.bytes_per_second + (0 if there else self.delay_seconds))
                if there:
                    piece = self._damaged(piece)
                    self.passed += len(piece)
                    if self._stall_after is not None and self.passed > self._stall_after:
                        self._flows.clear()
                self._flows.wait()
                sink.sendall(piece)
        # Each side of the pair ends when either does; close() alone would not wake the other thread.
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RD)
        self._sockets.discard(source)
        source.close()

    def _damaged(self, piece: bytes) -> bytes:
        found = piece.find(self._fragile) if self.damages else -1
        if found < 0:
            return piece
        self.damages -= 1
        middle = found + len(self._fragile) // 2
        return piece[:middle] + bytes([piece[middle] ^ 1]) + piece[middle + 1 :]
