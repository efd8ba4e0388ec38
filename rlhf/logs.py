"""Structured log lines: for people on a terminal, JSON for machines, the same for the libraries' own lines.

Loggers work without any set-up, as those of the standard library do; a process calls `configure_logging` once.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
from collections.abc import Iterator, MutableMapping
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

import structlog

LogFormat = Literal["auto", "text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]

_FIELDS = "structlog_fields"


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """A logger for lines of the form `log.info("what happened", key=value)`."""
    logger: structlog.stdlib.BoundLogger = structlog.wrap_logger(
        logging.getLogger(name),
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.stdlib.PositionalArgumentsFormatter(),
            _to_record,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    return logger


@contextlib.contextmanager
def bound_context(
    *,
    run_id: str | None = None,
    step: int | None = None,
    request_id: str | None = None,
    rank: int | None = None,
) -> Iterator[None]:
    """Give every line logged inside, in this task and those it starts, what is not None."""
    given = {"run_id": run_id, "step": step, "request_id": request_id, "rank": rank}
    with structlog.contextvars.bound_contextvars(**{key: value for key, value in given.items() if value is not None}):
        yield


def configure_logging(format: LogFormat, level: LogLevel) -> None:
    """Send all lines of this process at or above `level` to standard error.

    format: "text" for people, "json" for machines, "auto" = text on a terminal and JSON elsewhere.
    """
    handler = _StandardErrorHandler()
    handler.setFormatter(_LineFormatter(_renderer(format)))
    root = logging.getLogger()
    for former in [each for each in root.handlers if isinstance(each, _StandardErrorHandler)]:
        root.removeHandler(former)
    root.addHandler(handler)
    root.setLevel(level.upper())
    logging.captureWarnings(True)


def _renderer(format: LogFormat) -> structlog.typing.Processor:
    terminal = sys.stderr.isatty()
    if format == "json" or (format == "auto" and not terminal):
        return structlog.processors.JSONRenderer(ensure_ascii=False, default=str)
    return structlog.dev.ConsoleRenderer(
        colors=terminal and "NO_COLOR" not in os.environ,
        exception_formatter=structlog.dev.plain_traceback,
        pad_event_to=0,
    )


def _to_record(
    logger: logging.Logger, method: str, event: MutableMapping[str, Any]
) -> tuple[tuple[str], dict[str, Any]]:
    """Hand a line to the standard library: readable under any handler, its fields beside it for ours."""
    message = str(event.pop("event", ""))
    passed_on = {key: event.pop(key) for key in ("exc_info", "stack_info", "stacklevel") if key in event}
    text = " ".join([message, *(f"{key}={value!r}" for key, value in event.items())])
    return (text,), {**passed_on, "extra": {_FIELDS: {"event": message, **event}}}


class _StandardErrorHandler(logging.StreamHandler[TextIO]):
    """Writes to what sys.stderr is at the time: a live display puts itself in its place."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


class _LineFormatter(logging.Formatter):
    def __init__(self, renderer: structlog.typing.Processor) -> None:
        super().__init__()
        self._renderer = renderer
        self._json = isinstance(renderer, structlog.processors.JSONRenderer)

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = getattr(record, _FIELDS, None) or {"event": record.getMessage()}
        time = datetime.fromtimestamp(record.created, tz=UTC)
        line: dict[str, Any] = {
            "timestamp": time.isoformat(timespec="milliseconds").replace("+00:00", "Z")
            if self._json
            else time.astimezone().strftime("%H:%M:%S.%f")[:-3],
            "level": record.levelname.lower(),
            "logger": record.name,
            **structlog.contextvars.get_contextvars(),
            **fields,
        }
        if record.exc_info and record.exc_info[0] is not None:
            line["exception"] = self.formatException(record.exc_info)
        if self._json:
            line = {key: _without_nan(value) for key, value in line.items()}
        return str(self._renderer(None, record.levelname.lower(), line))


def _without_nan(value: Any) -> Any:
    """JSON has no NaN and no infinities."""
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value
