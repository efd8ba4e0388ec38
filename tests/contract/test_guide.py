"""docs/contract.md: its commands call what exists with what it takes, and its links lead somewhere."""

from __future__ import annotations

import re

from google.protobuf import descriptor_pool, json_format, message_factory
from grpc_health.v1 import health_pb2

from rlhf.policy.v1 import policy_pb2
from rlhf.reward.v1 import reward_pb2
from rlhf.weights.v1 import weights_pb2
from tests.contract.conftest import ROOT, Contract

_GUIDE = ROOT / "docs" / "contract.md"
_MODULES = (policy_pb2, reward_pb2, weights_pb2, health_pb2)  # imported, their services are in the default pool


def test_every_command_of_the_guide_sends_a_request_that_the_rpc_takes() -> None:
    pool = descriptor_pool.Default()
    commands = re.findall(r"^\$ grpcurl (.*?[a-z]/[A-Z]\w+)$", _GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    calls = [(command, re.search(r"(\S+)/(\w+)$", command)) for command in commands]
    assert len(calls) >= len(_MODULES)
    for command, call in calls:
        assert call is not None
        method = pool.FindServiceByName(call[1]).FindMethodByName(call[2])
        body = re.search(r"-d '(.*?)'", command, re.DOTALL)
        json_format.Parse(body[1] if body else "{}", message_factory.GetMessageClass(method.input_type)())


def test_every_rpc_of_the_contract_is_in_the_guide(contract: Contract) -> None:
    guide = _GUIDE.read_text()
    assert not [str(rpc) for rpc in contract.of_kind("rpc") if rpc.name not in guide]


def test_every_link_of_the_guide_leads_to_a_file() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", _GUIDE.read_text())
    assert links
    assert not [link for link in links if not (_GUIDE.parent / link).exists()]
