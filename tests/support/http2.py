"""As much of HTTP/2, over a plain socket, as a hostile client needs: gRPC's own clients behave too well."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_END_HEADERS, _ACK, _END_STREAM = 4, 1, 1
_INITIAL_WINDOW = 4
_WINDOW = 65_535


class Http2Client:
    """One connection that sends what it is told and notes what comes back."""

    def __init__(self, address: str, *, takes: int | None = None) -> None:
        """`takes`: bytes of each answer that it is ready for; None = HTTP/2's 65,535."""
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), timeout=20)
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._connection_window = _WINDOW
        self._initial_window = _WINDOW
        self._windows: dict[int, int] = {}
        self.closed = False
        self.goaway: bytes = b""
        window = b"" if takes is None else struct.pack("!HI", _INITIAL_WINDOW, takes)
        self._socket.sendall(PREFACE + _frame(SETTINGS, 0, 0, window))
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Http2Client:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self.closed = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the reader
        self._socket.close()
        self._reader.join(10)

    def begin(self, stream: int, path: str, *more: tuple[str, str]) -> None:
        """Begin a call; `stream` is odd and higher than all before."""
        fields = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", path),
            (":authority", "localhost"),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
            *more,
        ]
        block = b"".join(_literal(name) for pair in fields for name in [pair])
        with self._lock:
            self._windows[stream] = self._initial_window
        # A frame holds at most 16 KiB; CONTINUATION (9) frames hold the rest of the headers.
        pieces = [block[start : start + 16_000] for start in range(0, len(block), 16_000)]
        for number, piece in enumerate(pieces):
            last = _END_HEADERS if number == len(pieces) - 1 else 0
            self.send(_frame(HEADERS if number == 0 else 9, last, stream, piece))

    def send(self, content: bytes) -> None:
        """Send bytes as they are. Raises OSError when the server has hung up."""
        self._socket.sendall(content)

    def send_message(self, stream: int, content: bytes) -> None:
        """Send the only message of a call, which the server's first window holds."""
        self.send(_frame(DATA, _END_STREAM, stream, struct.pack("!BI", 0, len(content)) + content))

    def send_message_part(self, stream: int, announced: int, count: int, within: float) -> int:
        """Begin a message of `announced` bytes and send `count` of them, as far as the server's windows let it.

        How many it took within so many seconds of waiting.
        """
        left = struct.pack("!BI", 0, announced) + bytes(count)
        sent = 0
        while left:
            with self._changed:
                room = self._changed.wait_for(lambda: self.closed or self._room(stream) > 0, timeout=within)
                if not room or self.closed:
                    return sent
                size = min(self._room(stream), len(left), 16_384)
                self._connection_window -= size
                self._windows[stream] -= size
            self.send(_frame(DATA, 0, stream, left[:size]))
            sent += size
            left = left[size:]
        return sent

    def wait_closed(self, within: float) -> bool:
        """Whether the server has ended the connection within so many seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: self.closed, timeout=within)

    def _room(self, stream: int) -> int:
        return min(self._connection_window, self._windows.get(stream, 0))

    def _read(self) -> None:
        try:
            while True:
                header = self._exactly(9)
                length = int.from_bytes(header[:3], "big")
                self._note(header[3], header[4], int.from_bytes(header[5:], "big"), self._exactly(length))
        except OSError:
            pass
        with self._changed:
            self.closed = True
            self._changed.notify_all()

    def _note(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        with self._changed:
            if kind == WINDOW_UPDATE:
                more = int.from_bytes(payload, "big")
                if stream == 0:
                    self._connection_window += more
                elif stream in self._windows:
                    self._windows[stream] += more
            elif kind == SETTINGS and not flags & _ACK:
                for number, value in struct.iter_unpack("!HI", payload):
                    if number == _INITIAL_WINDOW:
                        for each in self._windows:
                            self._windows[each] += value - self._initial_window
                        self._initial_window = value
            elif kind == RST_STREAM:
                self._windows.pop(stream, None)
            elif kind == GOAWAY:
                self.goaway = payload[8:]
            self._changed.notify_all()
        if kind == SETTINGS and not flags & _ACK:
            self.send(_frame(SETTINGS, _ACK, 0, b""))
        elif kind == PING and not flags & _ACK:
            self.send(_frame(PING, _ACK, 0, payload))

    def _exactly(self, size: int) -> bytes:
        content = b""
        while len(content) < size:
            piece = self._socket.recv(size - len(content))
            if not piece:
                raise OSError("closed")
            content += piece
        return content


def ping() -> bytes:
    """A PING frame."""
    return _frame(PING, 0, 0, bytes(8))


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def _literal(field: tuple[str, str]) -> bytes:
    """A header of HPACK, neither indexed nor Huffman-coded."""
    return b"\x00" + b"".join(_length(len(text)) + text.encode() for text in field)


def _length(size: int) -> bytes:
    """An integer of HPACK with a prefix of 7 bits."""
    if size < 127:
        return bytes([size])
    encoded, size = [127], size - 127
    while size >= 128:
        encoded.append(size % 128 + 128)
        size //= 128
    return bytes([*encoded, size])
