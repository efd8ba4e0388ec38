"""The status of a call that failed, with its google.rpc details."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

_DETAILS_KEY = "grpc-status-details-bin"


@dataclass(frozen=True)
class Status:
    """What a call came back with; details that are missing or unreadable are empty, or None."""

    code: grpc.StatusCode
    message: str = ""
    domain: str = ""
    reason: str = ""
    paths: tuple[str, ...] = ()
    retry_seconds: float | None = None

    @property
    def passing(self) -> bool:
        """Whether a client may send the same call again."""
        return self.code is grpc.StatusCode.UNAVAILABLE or self.overloaded

    @property
    def overloaded(self) -> bool:
        """Whether the server says that it has too much to do just now."""
        return self.code is grpc.StatusCode.RESOURCE_EXHAUSTED and self.retry_seconds is not None

    def __str__(self) -> str:
        details = [f"ErrorInfo({self.domain}, {self.reason})"] if self.domain or self.reason else []
        details += [f"BadRequest({', '.join(self.paths)})"] if self.paths else []
        details += [f"RetryInfo({self.retry_seconds:g} s)"] if self.retry_seconds is not None else []
        return " ".join([self.code.name, *([f'"{self.message}"'] if self.message else []), *details])


def seconds_of(duration: Duration) -> float:
    """A duration as it came over the wire; protobuf's own conversions raise for what is none."""
    return duration.seconds + duration.nanos / 1e9


def read_status(error: grpc.aio.AioRpcError) -> Status:
    """The status that a call's error stands for."""
    domain = reason = ""
    paths: list[str] = []
    retry_seconds: float | None = None
    trailers = cast(Iterable[tuple[str, bytes]], error.trailing_metadata() or ())
    with contextlib.suppress(DecodeError):  # what was readable before must do
        for detail in (
            detail
            for key, value in trailers
            if key == _DETAILS_KEY
            for detail in status_pb2.Status.FromString(value).details
        ):
            info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
            request = error_details_pb2.BadRequest()
            if detail.Unpack(info):
                domain, reason = info.domain, info.reason
            elif detail.Unpack(retry):
                retry_seconds = seconds_of(retry.retry_delay)
            elif detail.Unpack(request):
                paths += [violation.field for violation in request.field_violations]
    return Status(error.code(), error.details() or "", domain, reason, tuple(paths), retry_seconds)
