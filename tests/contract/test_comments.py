"""The comments are the promise: these tests find what they leave out and what they name wrongly."""

from __future__ import annotations

import re
from collections.abc import Iterator

import grpc
import pytest
from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto

from tests.contract.conftest import OWN_FILES, PROTOS, Contract, Symbol, head_of

_CODES = {code.name for code in grpc.StatusCode} - {"OK", "UNKNOWN"}
# Messages that a client sends, with what they hold.
_REQUESTS = {
    "rlhf/policy/v1/policy.proto": ("GenerateRequest", "StreamGenerateRequest", "LogProbsRequest", "GetModelRequest"),
    "rlhf/weights/v1/weights.proto": ("UpdateWeightsRequest", "GetWeightsRequest"),
    "rlhf/reward/v1/reward.proto": ("ScoreRequest", "GetRewardInfoRequest"),
}
_WHAT_LEAVING_OUT_MEANS = re.compile(r"unset|empty|required|false =|\b0 =|from [01]|at least (one|1)", re.IGNORECASE)


def test_every_name_has_a_comment_that_says_more_than_the_name(contract: Contract) -> None:
    poor = [str(symbol) for symbol in contract.symbols if len(_own_words(symbol)) < 3]
    assert not poor


def test_the_comment_of_an_enum_value_starts_with_its_name(contract: Contract) -> None:
    nameless = [str(value) for value in contract.of_kind("value") if not value.comment.strip().startswith(value.name)]
    assert not nameless


def test_what_a_client_may_leave_out_says_what_leaving_it_out_means(contract: Contract) -> None:
    sent = {(file, name) for file, names in _REQUESTS.items() for name in _reached(contract, file, names)}
    silent = [
        str(symbol)
        for symbol in contract.of_kind("field")
        if (symbol.file, symbol.parent) in sent
        and not _in_a_real_oneof(symbol)
        and not _WHAT_LEAVING_OUT_MEANS.search(symbol.comment)
    ]
    assert not silent


def test_a_field_with_presence_says_what_unset_means(contract: Contract) -> None:
    silent = [
        str(symbol)
        for symbol in contract.of_kind("field")
        if symbol.field is not None
        and symbol.field.proto3_optional
        and not re.search(r"unset|required", symbol.comment, re.IGNORECASE)
    ]
    assert not silent


@pytest.mark.parametrize(("ending", "unit"), [("_bytes", "bytes"), ("_tokens", "token"), ("logprobs", "nats")])
def test_a_quantity_names_its_unit(contract: Contract, ending: str, unit: str) -> None:
    quantities = [
        symbol
        for symbol in contract.of_kind("field")
        if symbol.name.endswith(ending) and symbol.field is not None and symbol.field.type not in _NO_QUANTITY
    ]
    assert quantities
    assert not [str(symbol) for symbol in quantities if unit not in symbol.comment.lower()]


def test_every_path_that_a_comment_promises_exists_in_a_request(contract: Contract) -> None:
    wrong = [
        f"{symbol}: {path}"
        for symbol in contract.symbols
        for path in _promised_paths(contract, symbol)
        if not any(_leads_somewhere(contract, symbol.file, request, path) for request in _REQUESTS[symbol.file])
    ]
    assert not wrong


def test_the_paths_are_found_at_all(contract: Contract) -> None:
    paths = {path for symbol in contract.symbols for path in _promised_paths(contract, symbol)}
    assert {"prompt.token_ids.ids[7]", "begin.update_id", "samples[3].sample_id", "sequences"} <= paths


@pytest.mark.parametrize("file", OWN_FILES)
def test_every_status_code_that_a_file_names_is_in_its_service_table(contract: Contract, file: str) -> None:
    (service,) = [symbol for symbol in contract.of_kind("service") if symbol.file == file]
    tabled = set(re.findall(r"^\s*\| ([A-Z_]+)", service.comment, re.MULTILINE))
    named = {
        word
        for symbol in contract.symbols
        if symbol.file == file
        for word in re.findall(r"\b[A-Z_]{5,}\b", symbol.comment)
        if word in _CODES
    }
    transport = {"CANCELLED", "DEADLINE_EXCEEDED", "OUT_OF_RANGE"}  # made by gRPC itself, and told under Retries
    assert named - transport <= tabled
    assert tabled <= _CODES


@pytest.mark.parametrize("file", OWN_FILES)
def test_every_reason_that_a_field_names_is_in_the_service_table(contract: Contract, file: str) -> None:
    (service,) = [symbol for symbol in contract.of_kind("service") if symbol.file == file]
    named = {
        reason
        for symbol in contract.symbols
        if symbol.file == file
        for reason in re.findall(r"reasons? ([A-Z_]{5,})", symbol.comment)
    }
    assert named <= {reason for _, reason in reasons_in(service.comment)}


@pytest.mark.parametrize("file", OWN_FILES)
def test_every_file_begins_with_what_will_never_change(file: str) -> None:
    head = head_of(file)
    assert "What will never change in v1" in head
    assert len(re.findall(r"^// \| .+ \| .+ \|$", head, re.MULTILINE)) >= 4
    assert "RFC 2119" in head


@pytest.mark.parametrize("file", OWN_FILES)
def test_obligations_are_written_in_capitals(file: str) -> None:
    text = (PROTOS / file).read_text()
    assert not re.findall(r".*\b(?:must|shall|should)\b.*", text)


def reasons_in(service_comment: str) -> list[tuple[str, str]]:
    """The first two columns of a service's table: (status code, reason)."""
    return re.findall(r"^\s*\| ([A-Z_]+) \| ([A-Z_]+) \| .* \| .* \|$", service_comment, re.MULTILINE)


_NO_QUANTITY = {FieldDescriptorProto.TYPE_BOOL, FieldDescriptorProto.TYPE_ENUM}


def _own_words(symbol: Symbol) -> set[str]:
    """Words of the comment that are not already in the name."""
    name = set(re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", symbol.name).lower()))
    without_name = symbol.comment.replace(symbol.name, "")
    return set(re.findall(r"[a-z0-9]+", without_name.lower())) - name - {"a", "an", "the", "is", "of"}


def _in_a_real_oneof(symbol: Symbol) -> bool:
    """Whether it is one of several kinds, where the oneof's own comment says what none of them means."""
    field = symbol.field
    return field is not None and field.HasField("oneof_index") and not field.proto3_optional


def _reached(contract: Contract, file: str, names: tuple[str, ...]) -> set[str]:
    """Messages of `file` that these hold, themselves included."""
    found: set[str] = set()
    todo = list(names)
    while todo:
        name = todo.pop()
        if name in found:
            continue
        found.add(name)
        package = contract.files[file].package
        message = contract.message(f".{package}.{name}")
        todo += [
            field.type_name.rsplit(".", 1)[1]
            for field in message.field
            if field.type == FieldDescriptorProto.TYPE_MESSAGE
            and field.type_name.startswith(f".{package}.")
            and not field.type_name.endswith("Entry")
        ]
    return found


def _promised_paths(contract: Contract, symbol: Symbol) -> Iterator[str]:
    """Quoted paths after a status code or beside other quoted paths, e.g. INVALID_ARGUMENT "sampling.n"."""
    comment = re.sub(r"\s+", " ", symbol.comment)
    for quoted in re.findall(r'"([^" ]+)"', comment):
        plain = f'INVALID_ARGUMENT "{quoted}"' in comment or f'path is "{quoted}"' in comment
        if plain or re.fullmatch(r"[a-z0-9_.]+\[\d+\][a-z0-9_.\[\]]*", quoted):
            yield quoted


def _leads_somewhere(contract: Contract, file: str, request: str, path: str) -> bool:
    message: DescriptorProto | None = contract.message(f".{contract.files[file].package}.{request}")
    for step in path.split("."):
        name, indexed = re.fullmatch(r"([a-z0-9_]+)(\[\d+\])?", step).groups()
        if message is None:
            return False
        if any(oneof.name == name for oneof in message.oneof_decl):
            message = None
            continue
        field = next((field for field in message.field if field.name == name), None)
        if field is None or (indexed and field.label != FieldDescriptorProto.LABEL_REPEATED):
            return False
        is_message = field.type == FieldDescriptorProto.TYPE_MESSAGE
        message = contract.message(field.type_name) if is_message else None
    return True
