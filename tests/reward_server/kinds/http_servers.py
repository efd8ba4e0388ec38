"""A real HTTP server that answers POST as a test tells it to, and remembers what it was asked."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Asked:
    """One request: when it came (time.monotonic()), and whether its client went away before the answer."""

    body: Any
    headers: dict[str, str]
    at: float
    gone: Callable[[], bool]


@dataclass
class Answer:
    """What is sent back; a body that is no bytes is sent as JSON."""

    body: Any = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


Script = Answer | Callable[[Asked], Answer]


class WebServer:
    """Answers by `scripts`, one after the other; the last answers all further requests."""

    def __init__(self, *scripts: Script) -> None:
        self.asked: list[Asked] = []
        self.most_at_once = 0
        self.scripts = list(scripts)
        self._at_once = 0
        self._lock = threading.Lock()

        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            # With Nagle's algorithm, headers and body in two writes cost 40 ms.
            disable_nagle_algorithm = True

            def do_POST(self) -> None:
                outer._post(self)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @contextlib.contextmanager
    def serving(self) -> Iterator[WebServer]:
        thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()

    def _post(self, handler: BaseHTTPRequestHandler) -> None:
        content = handler.rfile.read(int(handler.headers["content-length"]))

        def gone() -> bool:
            handler.connection.settimeout(0.01)
            try:
                return handler.connection.recv(1) == b""
            except TimeoutError:
                return False
            except ConnectionError:
                return True

        asked = Asked(json.loads(content), {k.lower(): v for k, v in handler.headers.items()}, time.monotonic(), gone)
        with self._lock:
            self.asked.append(asked)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
        answer = script(asked) if callable(script) else script
        with self._lock:
            self._at_once -= 1
        body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        with contextlib.suppress(OSError):
            handler.send_response(answer.status)
            for name, value in {"content-type": "application/json", **answer.headers}.items():
                handler.send_header(name, value)
            handler.send_header("content-length", str(len(body)))
            handler.end_headers()
            handler.wfile.write(body)


def until_gone(asked: Asked) -> Answer:
    """A script that answers only when its client has gone away, or after 20 s."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and not asked.gone():
        pass
    return Answer(status=200 if time.monotonic() > deadline else 499)


def unused_url() -> str:
    """Where nobody listens."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    server.server_close()
    return f"http://127.0.0.1:{server.server_port}"
