"""The contract as its own source tells it: descriptors with their comments."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
)

ROOT = Path(__file__).resolve().parents[2]
PROTOS = ROOT / "protos"
OWN_FILES = sorted(path.relative_to(PROTOS).as_posix() for path in PROTOS.rglob("*.proto"))


@dataclass(frozen=True)
class Symbol:
    """A name of the contract with the comment before it; `field` for fields only, in the message `parent`."""

    file: str
    kind: str
    parent: str
    name: str
    comment: str
    field: FieldDescriptorProto | None = None

    def __str__(self) -> str:
        return f"{self.parent}.{self.name}" if self.parent else self.name


@dataclass(frozen=True)
class Contract:
    """All files, and every symbol in them."""

    files: dict[str, FileDescriptorProto]
    symbols: tuple[Symbol, ...]

    def of_kind(self, *kinds: str) -> list[Symbol]:
        """Symbols of these kinds."""
        return [symbol for symbol in self.symbols if symbol.kind in kinds]

    def message(self, full_name: str) -> DescriptorProto:
        """The message of a name like .rlhf.policy.v1.Prompt."""
        for file in self.files.values():
            for message in file.message_type:
                if f".{file.package}.{message.name}" == full_name:
                    return message
        raise KeyError(full_name)


@pytest.fixture(scope="session")
def contract(tmp_path_factory: pytest.TempPathFactory) -> Contract:
    """Compiled afresh, since stubs hold no comments."""
    target = tmp_path_factory.mktemp("contract") / "protos.binpb"
    arguments = [f"-I{PROTOS}", f"--descriptor_set_out={target}", "--include_source_info", "--include_imports"]
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", *arguments, *OWN_FILES], check=True)
    compiled = FileDescriptorSet.FromString(target.read_bytes())
    files = {file.name: file for file in compiled.file if file.name in OWN_FILES}
    return Contract(files, tuple(symbol for file in files.values() for symbol in _symbols(file)))


def head_of(file: str) -> str:
    """The comment before the syntax line."""
    return (PROTOS / file).read_text().split("\nsyntax", 1)[0]


def _symbols(file: FileDescriptorProto) -> Iterator[Symbol]:
    comments = {tuple(location.path): location.leading_comments for location in file.source_code_info.location}
    for at, service in enumerate(file.service):
        yield Symbol(file.name, "service", "", service.name, comments.get((6, at), ""))
        for inner, method in enumerate(service.method):
            yield Symbol(file.name, "rpc", service.name, method.name, comments.get((6, at, 2, inner), ""))
    for at, message in enumerate(file.message_type):
        assert not message.enum_type, "nested types need a walk of their own"
        yield Symbol(file.name, "message", "", message.name, comments.get((4, at), ""))
        yield from _fields(file, at, message, comments)
    for at, enum in enumerate(file.enum_type):
        yield Symbol(file.name, "enum", "", enum.name, comments.get((5, at), ""))
        yield from _values(file, at, enum, comments)


def _fields(
    file: FileDescriptorProto, at: int, message: DescriptorProto, comments: dict[tuple[int, ...], str]
) -> Iterator[Symbol]:
    for inner, field in enumerate(message.field):
        yield Symbol(file.name, "field", message.name, field.name, comments.get((4, at, 2, inner), ""), field)
    for inner, oneof in enumerate(message.oneof_decl):
        if not oneof.name.startswith("_"):  # those are how proto3 writes `optional`
            yield Symbol(file.name, "oneof", message.name, oneof.name, comments.get((4, at, 8, inner), ""))


def _values(
    file: FileDescriptorProto, at: int, enum: EnumDescriptorProto, comments: dict[tuple[int, ...], str]
) -> Iterator[Symbol]:
    for inner, value in enumerate(enum.value):
        yield Symbol(file.name, "value", enum.name, value.name, comments.get((5, at, 2, inner), ""))
