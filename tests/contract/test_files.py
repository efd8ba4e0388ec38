"""What every implementer's tools need of the files, whatever their language."""

from __future__ import annotations

import pytest
from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto

from tests.contract.conftest import OWN_FILES, Contract

_SIXTY_FOUR_BITS = {
    FieldDescriptorProto.TYPE_INT64,
    FieldDescriptorProto.TYPE_UINT64,
    FieldDescriptorProto.TYPE_SINT64,
    FieldDescriptorProto.TYPE_FIXED64,
    FieldDescriptorProto.TYPE_SFIXED64,
}
_REWARD = "rlhf/reward/v1/reward.proto"


@pytest.mark.parametrize("file", OWN_FILES)
def test_go_and_java_are_told_their_packages(contract: Contract, file: str) -> None:
    descriptor = contract.files[file]
    name = descriptor.package.split(".")[1]
    assert descriptor.options.go_package == f"rlhf-services/gen/rlhf/{name}/v1;{name}v1"
    assert descriptor.options.java_package == f"dev.rlhf.{name}.v1"
    assert descriptor.options.java_multiple_files


@pytest.mark.parametrize("file", OWN_FILES)
def test_the_path_of_a_file_is_its_package(contract: Contract, file: str) -> None:
    assert file.rsplit("/", 1)[0] == contract.files[file].package.replace(".", "/")


@pytest.mark.parametrize("file", OWN_FILES)
def test_a_protoc_of_2022_reads_it(contract: Contract, file: str) -> None:
    # Debian 12 has protoc 3.21: proto3 with optional fields, no editions.
    descriptor = contract.files[file]
    assert descriptor.syntax == "proto3"
    assert not descriptor.HasField("edition")


def test_a_reward_server_needs_no_other_file_than_its_own(contract: Contract) -> None:
    assert list(contract.files[_REWARD].dependency) == ["google/protobuf/duration.proto"]


def test_a_reward_server_in_javascript_meets_no_64_bit_integer(contract: Contract) -> None:
    fields = [
        f"{message.name}.{field.name}"
        for message in _with_nested(contract.files[_REWARD].message_type)
        for field in message.field
        if field.type in _SIXTY_FOUR_BITS
    ]
    assert not fields


def test_the_search_for_64_bit_integers_finds_those_of_the_policy(contract: Contract) -> None:
    policy = contract.files["rlhf/policy/v1/policy.proto"]
    found = [field for message in _with_nested(policy.message_type) for field in message.field]
    assert any(field.type in _SIXTY_FOUR_BITS for field in found)


@pytest.mark.parametrize("file", OWN_FILES)
def test_every_rpc_has_a_request_and_a_response_of_its_own(contract: Contract, file: str) -> None:
    (service,) = contract.files[file].service
    for method in service.method:
        assert method.input_type.rsplit(".", 1)[1] == f"{method.name}Request"
        assert method.output_type.rsplit(".", 1)[1] == f"{method.name}Response"


def _with_nested(messages: object) -> list[DescriptorProto]:
    """Map entries are nested messages, and hold values too."""
    found = list(messages)  # type: ignore[call-overload]
    return found + [nested for message in found for nested in message.nested_type]
