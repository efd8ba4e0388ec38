"""Every RPC of every service has its roles, and what has none is refused."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FileDescriptor
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from rlhf.failures import RpcFailure
from rlhf.policy.v1 import policy_pb2
from rlhf.reward.v1 import reward_pb2
from rlhf.security.roles import ANYONE, ROLES, Role, is_for_anyone, is_training, require_role
from rlhf.weights.v1 import weights_pb2
from tests.support.processes import ROOT

POLICY = "/rlhf.policy.v1.PolicyService"
WEIGHTS = "/rlhf.weights.v1.WeightsService"
REWARD = "/rlhf.reward.v1.RewardService"

MATRIX = {
    Role.APP: {f"{POLICY}/Generate", f"{POLICY}/StreamGenerate", f"{POLICY}/GetModel"},
    Role.ROLLOUT: {f"{POLICY}/Generate", f"{POLICY}/StreamGenerate", f"{POLICY}/GetModel", f"{POLICY}/LogProbs"},
    Role.SCORER: {f"{REWARD}/Score", f"{REWARD}/GetRewardInfo"},
    Role.WRITER: {f"{WEIGHTS}/UpdateWeights", f"{WEIGHTS}/GetWeights"},
}
"""What each role is for, written down once more."""


def _rpcs_of(*files: FileDescriptor) -> Iterator[str]:
    for file in files:
        for service in file.services_by_name.values():
            yield from (f"/{service.full_name}/{method.name}" for method in service.methods)


def _ours() -> set[str]:
    return set(_rpcs_of(policy_pb2.DESCRIPTOR, weights_pb2.DESCRIPTOR, reward_pb2.DESCRIPTOR))


def test_every_rpc_of_the_stubs_has_its_roles_and_nothing_else_has() -> None:
    served = _ours() | set(_rpcs_of(health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR))
    assert ROLES.keys() == served


def test_no_proto_is_left_out() -> None:
    stubs = {path.name for path in (ROOT / "rlhf").glob("*/v*/*_pb2.py")}
    assert stubs == {"policy_pb2.py", "weights_pb2.py", "reward_pb2.py"}


@pytest.mark.parametrize(("role", "rpc"), list(itertools.product(MATRIX, sorted(_ours()))))
def test_a_role_may_call_what_it_is_for_and_nothing_else(role: Role, rpc: str) -> None:
    if rpc in MATRIX[role]:
        require_role(rpc, frozenset({role}))
        return
    with pytest.raises(RpcFailure) as refused:
        require_role(rpc, frozenset({role}))
    assert refused.value.code is grpc.StatusCode.PERMISSION_DENIED


def test_an_admin_may_call_everything_that_is_declared() -> None:
    for rpc in ROLES:
        require_role(rpc, frozenset({Role.ADMIN}))


def test_an_rpc_that_is_not_declared_is_refused_even_to_an_admin() -> None:
    with pytest.raises(RpcFailure) as refused:
        require_role(f"{POLICY}/Forgotten", frozenset(Role))
    assert refused.value.code is grpc.StatusCode.PERMISSION_DENIED
    assert not is_for_anyone(f"{POLICY}/Forgotten")


def test_only_a_health_check_needs_no_identity() -> None:
    assert [rpc for rpc, roles in ROLES.items() if roles == ANYONE] == ["/grpc.health.v1.Health/Check"]


@pytest.mark.parametrize(
    ("roles", "training"),
    [
        ({Role.ROLLOUT, Role.WRITER}, True),
        ({Role.ROLLOUT, Role.APP}, False),
        ({Role.ADMIN, Role.ROLLOUT}, False),
        ({Role.APP}, False),
    ],
)
def test_who_is_there_for_training_alone_is_known_by_its_roles(roles: Any, training: bool) -> None:
    assert is_training(frozenset(roles)) is training
