"""The one table of failures: which status code, reason and details each kind of failure has on the wire.

Handlers raise what the constructors below make; rlhf/server.py sends it, and `from_rpc_error` reads it on the other
side, so that code, retry policy and documentation can't drift apart.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

DOMAIN = "rlhf-services"
DETAILS_KEY = "grpc-status-details-bin"

# Trailers above 8 KB reach the client as RESOURCE_EXHAUSTED, whatever the code was. A message travels twice (once
# percent-encoded), details once (at worst in base64): together at most 1.5 + 4/3 * 4 KB.
MAX_MESSAGE_BYTES = 1500
_MAX_DETAILS_BYTES = 4000
_MAX_FIELD_BYTES = 200
_MAX_DESCRIPTION_BYTES = 400
_MAX_METADATA_BYTES = 600
_MAX_REASON_BYTES = 63  # google.rpc.ErrorInfo's own limit

_TRANSIENT = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED})


@dataclass(frozen=True)
class FieldViolation:
    """A field of a request, as a path in the proto ("sequences[3].prompt_token_ids[7]"), and what is wrong with it."""

    field: str
    description: str


class RpcFailure(Exception):  # noqa: N818 - a failure that travels, on both sides of the wire
    """A call that failed: raised by handlers on the server, and by clients out of `from_rpc_error`.

    reason: UPPER_SNAKE_CASE, empty when a server of another make sent none. retry_after: seconds, None = not said.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        *,
        reason: str = "",
        violations: Sequence[FieldViolation] = (),
        retry_after: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(f"{code.name}: {message}")
        self.code = code
        self.message = message
        self.reason = reason
        self.violations = tuple(violations)
        self.retry_after = retry_after
        self.metadata = dict(metadata or {})


def invalid_argument(field: str, description: str) -> RpcFailure:
    """One field of the request is wrong; `description` says how, with the limit."""
    return invalid_arguments([FieldViolation(field, description)])


def invalid_arguments(violations: Sequence[FieldViolation]) -> RpcFailure:
    """Several fields of the request are wrong; at least one."""
    if not violations:
        raise ValueError("a request without violations is valid")
    message = "; ".join(f"{violation.field}: {violation.description}" for violation in violations)
    return RpcFailure(grpc.StatusCode.INVALID_ARGUMENT, message, reason="INVALID_FIELD", violations=violations)


def not_found(field: str, what: str) -> RpcFailure:
    """`what` ("model 'x'"), named by `field`, does not exist here."""
    return RpcFailure(
        grpc.StatusCode.NOT_FOUND,
        f"{field}: {what} not found",
        reason="NOT_FOUND",
        violations=[FieldViolation(field, f"{what} not found")],
    )


def weights_behind(message: str) -> RpcFailure:
    """The weights asked for are newer than those live: later, or on another replica, the call may succeed."""
    return failed_precondition("WEIGHTS_BEHIND", message)


def weights_ahead(message: str) -> RpcFailure:
    """The weights asked for are older than those live: final."""
    return failed_precondition("WEIGHTS_AHEAD", message)


def other_run(message: str) -> RpcFailure:
    """The weights that are live belong to another run: final."""
    return failed_precondition("OTHER_RUN", message)


def failed_precondition(reason: str, message: str) -> RpcFailure:
    """The state of the server does not allow the call, and calling again does not change it."""
    return RpcFailure(grpc.StatusCode.FAILED_PRECONDITION, message, reason=reason)


def aborted(reason: str, message: str) -> RpcFailure:
    """Lost against another writer, or against what is live already."""
    return RpcFailure(grpc.StatusCode.ABORTED, message, reason=reason)


def overloaded(message: str, retry_after: float) -> RpcFailure:
    """A bounded queue or memory is full; worth another try after `retry_after` seconds, above 0."""
    return RpcFailure(grpc.StatusCode.RESOURCE_EXHAUSTED, message, reason="OVERLOADED", retry_after=retry_after)


def too_large(message: str) -> RpcFailure:
    """More than this server can ever take; the same code as `overloaded`, but without RetryInfo, so not retried."""
    return RpcFailure(grpc.StatusCode.RESOURCE_EXHAUSTED, message, reason="TOO_LARGE")


def unavailable(message: str, retry_after: float | None = None) -> RpcFailure:
    """Loading, draining, or waiting for something; worth another try."""
    return RpcFailure(grpc.StatusCode.UNAVAILABLE, message, reason="UNAVAILABLE", retry_after=retry_after)


def data_loss(message: str) -> RpcFailure:
    """Bytes arrived that are not those that were sent, or a file is not what it should be."""
    return RpcFailure(grpc.StatusCode.DATA_LOSS, message, reason="DATA_LOSS")


def unauthenticated(message: str) -> RpcFailure:
    """Nobody knows who calls; the message holds nothing that was sent."""
    return RpcFailure(grpc.StatusCode.UNAUTHENTICATED, message, reason="UNAUTHENTICATED")


def permission_denied(message: str) -> RpcFailure:
    """The caller may not do this."""
    return RpcFailure(grpc.StatusCode.PERMISSION_DENIED, message, reason="PERMISSION_DENIED")


def internal(message: str) -> RpcFailure:
    """A fault of the server. The message goes to the caller: nothing in it may be for the log only."""
    return RpcFailure(grpc.StatusCode.INTERNAL, message, reason="INTERNAL")


def to_status(failure: RpcFailure) -> tuple[grpc.StatusCode, str, tuple[tuple[str, bytes], ...]]:
    """Code, message and trailing metadata of a failure, cut so that the code always reaches the client."""
    message = _cut_message(failure.message)
    status = status_pb2.Status(code=failure.code.value[0], message=message)
    if failure.reason:
        info = error_details_pb2.ErrorInfo(reason=_cut(failure.reason, _MAX_REASON_BYTES), domain=DOMAIN)
        for key, value in failure.metadata.items():
            room = _MAX_METADATA_BYTES - info.ByteSize() - len(key.encode()) - 10
            if room > 0:
                info.metadata[key] = _cut(value, room)
        status.details.append(_packed(info))
    if failure.retry_after is not None:
        delay = Duration()
        delay.FromNanoseconds(max(0, round(failure.retry_after * 1e9)))
        status.details.append(_packed(error_details_pb2.RetryInfo(retry_delay=delay)))
    if failure.violations:
        room = _MAX_DETAILS_BYTES - status.ByteSize() - 100
        status.details.append(_packed(_bad_request(failure.violations, room)))
    return failure.code, message, ((DETAILS_KEY, status.SerializeToString()),)


def from_rpc_error(error: grpc.RpcError) -> RpcFailure:
    """What a call's error says; details that are missing or unreadable leave their fields empty."""
    code: grpc.StatusCode = error.code()
    message: str = error.details() or ""
    failure = RpcFailure(code, message)
    with contextlib.suppress(DecodeError):  # another make's mistake: what was read must do
        _read_details(error, failure)
    return failure


def is_transient(error: BaseException) -> bool:
    """Whether the same call, made again, may succeed.

    RESOURCE_EXHAUSTED counts only with RetryInfo: a message over the size limit has the same code and stays too large.
    Anything that is neither an RpcFailure nor a gRPC call's error is not transient.
    """
    if isinstance(error, grpc.RpcError):
        error = from_rpc_error(error)
    if not isinstance(error, RpcFailure):
        return False
    if error.code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return error.retry_after is not None
    return error.code in _TRANSIENT


def _read_details(error: grpc.RpcError, failure: RpcFailure) -> None:
    # The asyncio API and the other have different types for metadata; both iterate over pairs.
    trailing: Iterable[tuple[str, bytes]] = cast(Any, error).trailing_metadata() or ()
    statuses = (status_pb2.Status.FromString(value) for key, value in trailing if key == DETAILS_KEY)
    for detail in (detail for status in statuses for detail in status.details):
        info, retry, request = (
            error_details_pb2.ErrorInfo(),
            error_details_pb2.RetryInfo(),
            error_details_pb2.BadRequest(),
        )
        if detail.Unpack(info):
            failure.reason, failure.metadata = info.reason, dict(info.metadata)
        elif detail.Unpack(retry):
            failure.retry_after = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
        elif detail.Unpack(request):
            failure.violations = tuple(
                FieldViolation(each.field, each.description) for each in request.field_violations
            )


def _packed(detail: Message) -> AnyMessage:
    packed = AnyMessage()
    packed.Pack(detail)
    return packed


def _bad_request(violations: Sequence[FieldViolation], room: int) -> error_details_pb2.BadRequest:
    """As many violations as fit in `room` bytes."""
    request = error_details_pb2.BadRequest()
    for violation in violations:
        field = _cut(violation.field, _MAX_FIELD_BYTES)
        description = _cut(violation.description, _MAX_DESCRIPTION_BYTES)
        room -= len(field.encode()) + len(description.encode()) + 12
        if room < 0:
            break
        request.field_violations.add(field=field, description=description)
    return request


def _cut(text: str, size: int) -> str:
    """`text` in at most `size` bytes of UTF-8, without lone surrogates."""
    encoded = text[: size + 1].encode("utf-8", "replace")
    if len(encoded) <= size:
        return encoded.decode()
    return encoded[: max(0, size - 3)].decode("utf-8", "ignore") + "..."[:size]


def _cut_message(text: str) -> str:
    """`text`, at most MAX_MESSAGE_BYTES when percent-encoded, as gRPC sends it: 3 bytes for each beyond plain ASCII."""
    text = _cut(text, MAX_MESSAGE_BYTES)
    if _percent_encoded_length(text) <= MAX_MESSAGE_BYTES:
        return text
    room, kept = MAX_MESSAGE_BYTES - 3, 0
    for character in text:
        room -= _percent_encoded_length(character)
        if room < 0:
            break
        kept += 1
    return text[:kept] + "..."


def _percent_encoded_length(text: str) -> int:
    return sum(1 if 0x20 <= byte <= 0x7E and byte != 0x25 else 3 for byte in text.encode())
