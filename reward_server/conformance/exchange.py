"""One call as it went over the wire, and how it is shown to people."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import grpc
from google.protobuf import json_format, text_format
from google.protobuf.message import Message

from reward_server.conformance.status import Status
from rlhf.reward.v1 import reward_pb2

_SHOWN_CHARACTERS = 600
_COMMAND_CHARACTERS = 2000
_PRINTED_BYTES = 1 << 20

Headers = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Mistake:
    """What a wrong request has to be answered with: one of `codes`, the reason, and one of `paths`; empty = any."""

    codes: tuple[grpc.StatusCode, ...]
    reason: str
    paths: tuple[str, ...]


@dataclass(frozen=True)
class Exchange:
    """A request and what came back: a response, or a status that is not OK.

    case_id: the case that sent it. in_groups: whether the server declares SCOPE_GROUP. mistake: set when the request
    is wrong on purpose.
    watched: False when what is wrong with the answer is for the case that sent the request alone to say.
    """

    method: str
    request: Message | bytes
    response: Message | None
    status: Status | None
    seconds: float
    case_id: str = ""
    in_groups: bool = False
    headers: Headers = ()
    mistake: Mistake | None = None
    watched: bool = True

    @property
    def code(self) -> grpc.StatusCode:
        """The call's status code."""
        return grpc.StatusCode.OK if self.status is None else self.status.code

    def judgements(self) -> Iterator[tuple[reward_pb2.Sample, reward_pb2.SampleResult]]:
        """Each result with its sample; those of samples that the request does not have are left out."""
        if not self.is_answer():
            return
        assert isinstance(self.request, reward_pb2.ScoreRequest)
        assert isinstance(self.response, reward_pb2.ScoreResponse)
        samples = {sample.sample_id: sample for sample in self.request.samples}
        for result in self.response.results:
            if result.sample_id in samples:
                yield samples[result.sample_id], result

    def is_answer(self) -> bool:
        """Whether it holds outcomes of a request without a mistake, for every watching case to look at."""
        return self.watched and self.mistake is None and isinstance(self.response, reward_pb2.ScoreResponse)

    def sent(self) -> str:
        """The request in one line."""
        headers = "".join(f" [{key}: {value}]" for key, value in self.headers)
        return f"{self.method}{headers} {_shown(self.request)}".rstrip()

    def came_back(self) -> str:
        """The answer in one line."""
        if self.status is not None:
            return f"{self.status} after {self.seconds:.2f} s"
        return f"OK {_shown(self.response)}".rstrip()

    def as_json(self) -> str | None:
        """The request for a command line; None when JSON can't say it, or is too long to paste."""
        if isinstance(self.request, bytes) or self.request.ByteSize() > _COMMAND_CHARACTERS:
            return None
        if _has_unknown_fields(self.request):
            return None
        text = json_format.MessageToJson(self.request, indent=None, preserving_proto_field_name=True)
        return text if len(text) <= _COMMAND_CHARACTERS else None


def _shown(message: Message | bytes | None) -> str:
    if message is None:
        return ""
    if isinstance(message, bytes):
        return _cut(f"{len(message)} bytes: {message[:64].hex(' ')}")
    size = message.ByteSize()
    if size > _PRINTED_BYTES:
        return f"{{ {size} bytes }}"
    text = text_format.MessageToString(message, as_one_line=True, print_unknown_fields=True)
    return _cut(f"{{ {text} }}", f" ({size} bytes)") if text else "{}"


def _cut(text: str, note: str = "") -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…{note}"


def _has_unknown_fields(message: Message) -> bool:
    known = type(message)()
    known.CopyFrom(message)
    known.DiscardUnknownFields()
    return known.ByteSize() != message.ByteSize()
