"""The one table of which role may call which RPC. What is not in it nobody may call."""

from __future__ import annotations

import enum
from collections.abc import Mapping

from rlhf.failures import permission_denied


class Role(enum.StrEnum):
    """What an identity is there for; one identity may have several."""

    APP = "app"
    ROLLOUT = "rollout"
    SCORER = "scorer"
    WRITER = "writer"
    ADMIN = "admin"


ANYONE = frozenset(Role) | {None}
"""Callers without an identity, too."""

_EVERY_ROLE = frozenset(Role)
_GENERATES = frozenset({Role.APP, Role.ROLLOUT, Role.ADMIN})

RolesByRpc = Mapping[str, frozenset[Role | None]]

ROLES: RolesByRpc = {
    "/rlhf.policy.v1.PolicyService/Generate": _GENERATES,
    "/rlhf.policy.v1.PolicyService/StreamGenerate": _GENERATES,
    "/rlhf.policy.v1.PolicyService/GetModel": _GENERATES,
    "/rlhf.policy.v1.PolicyService/LogProbs": frozenset({Role.ROLLOUT, Role.ADMIN}),
    "/rlhf.weights.v1.WeightsService/UpdateWeights": frozenset({Role.WRITER, Role.ADMIN}),
    "/rlhf.weights.v1.WeightsService/GetWeights": frozenset({Role.WRITER, Role.ADMIN}),
    "/rlhf.reward.v1.RewardService/Score": frozenset({Role.SCORER, Role.ADMIN}),
    "/rlhf.reward.v1.RewardService/GetRewardInfo": frozenset({Role.SCORER, Role.ADMIN}),
    # Load balancers and probes have no identity. A watch stays open, so it is for those who have one.
    "/grpc.health.v1.Health/Check": ANYONE,
    "/grpc.health.v1.Health/List": _EVERY_ROLE,
    "/grpc.health.v1.Health/Watch": _EVERY_ROLE,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": _EVERY_ROLE,
}


def require_role(rpc: str, roles: frozenset[Role], table: RolesByRpc = ROLES) -> None:
    """Raise permission_denied unless one of `roles` may call `rpc` ("/package.Service/Method")."""
    allowed = table.get(rpc)
    if allowed is None:
        raise permission_denied(f"{rpc} has no role that may call it")
    if not allowed & roles:
        wanted = ", ".join(sorted(role for role in allowed if role is not None))
        raise permission_denied(f"{rpc} is for the role {wanted}; the caller has {', '.join(sorted(roles))}")


def is_for_anyone(rpc: str, table: RolesByRpc = ROLES) -> bool:
    """Whether `rpc` needs no identity."""
    return None in table.get(rpc, frozenset())


def is_training(roles: frozenset[Role]) -> bool:
    """Whether who has these is there for training alone, so that people who wait go first."""
    return Role.ROLLOUT in roles and not roles & {Role.APP, Role.ADMIN}
