"""The name of one set of policy weights, as the trainer counts them."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf.policy.v1 import policy_pb2


@dataclass(frozen=True, order=True)
class WeightsVersion:
    """Ordered by (incarnation, version) within a run; run_id "" = loaded by a server at its start, never published."""

    run_id: str = ""
    incarnation: int = 0
    version: int = 0

    def to_proto(self) -> policy_pb2.WeightsVersion:
        """The same as a message."""
        return policy_pb2.WeightsVersion(run_id=self.run_id, incarnation=self.incarnation, version=self.version)

    @classmethod
    def from_proto(cls, message: policy_pb2.WeightsVersion) -> WeightsVersion:
        """Read from a message."""
        return cls(message.run_id, message.incarnation, message.version)

    def is_after(self, other: WeightsVersion) -> bool:
        """True when both belong to one run and this one is newer."""
        return self.run_id == other.run_id and (self.incarnation, self.version) > (other.incarnation, other.version)

    def __str__(self) -> str:
        if not self.run_id:
            return "the weights loaded at start"
        return f"version {self.version} of run {self.run_id} (incarnation {self.incarnation})"
