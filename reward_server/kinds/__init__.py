"""The kinds of reward. A kind turns samples into outcomes; the service does everything that concerns the wire."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from reward_server.results import Outcome


@dataclass(frozen=True)
class Sample:
    """One completion to judge, decoded: `metadata` values are strings or what their JSON text meant.

    messages: chat turns as {"role": …, "content": …} mappings, empty when the prompt is not a chat.
    sampled_ranges: [first, past_last) pairs of `completion_ids`; empty = all of them were sampled by the policy.
    """

    prompt: str
    completion: str
    completion_ids: Sequence[int] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    messages: Sequence[Mapping[str, Any]] = ()
    sampled_ranges: Sequence[tuple[int, int]] = ()


@dataclass(frozen=True)
class Description:
    """What clients must know about a reward before they call it; constant while the process lives."""

    name: str
    version: str
    required_metadata: tuple[str, ...] = ()
    needs_token_ids: bool = False


class RewardKind(Protocol):
    """Turns samples into outcomes."""

    @property
    def description(self) -> Description:
        """What clients must know."""

    @property
    def concurrency(self) -> int:
        """How many `score` calls are useful at once; the service starts no more."""

    @property
    def stoppable(self) -> bool:
        """Whether cancelling `score` ends its work; a thread that runs cannot be ended."""

    async def score(self, samples: Sequence[Sample]) -> list[Outcome]:
        """One outcome per sample, in order; never raises for what a sample contains."""
