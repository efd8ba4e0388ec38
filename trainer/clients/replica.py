"""One policy server of a fleet: how to reach it, and what is known of it."""

from __future__ import annotations

import asyncio
import enum
import time
from dataclasses import dataclass, field

from trainer.clients.policy import PolicyClient
from trainer.clients.publisher import WeightPublisher
from trainer.versions import WeightsVersion


class ReplicaState(enum.Enum):
    """The values are the metrics' labels."""

    USABLE = "usable"
    """It answers; whether it has the weights that a call needs, `holds` tells."""
    AWAY = "away"
    REFUSED = "refused"
    """It is not a server of this run: another tokenizer or reference, limits too low, weights that don't fit."""


@dataclass(eq=False)
class Replica:
    """What the fleet knows; `holds` is the last version that was seen live on the process that answers."""

    target: str
    client: PolicyClient
    publisher: WeightPublisher
    state: ReplicaState = ReplicaState.AWAY
    why: str = "it has not answered yet"
    """Why it is away or refused, for people."""
    holds: WeightsVersion | None = None
    generating: int = 0
    """Generate calls in flight."""
    in_flight: int = 0
    """Calls in flight, of every kind."""
    strikes: int = 0
    """Times in a row that it was lost without answering a call between."""
    pause: float = 0.0
    """Seconds before it is tried again."""
    full_until: float = 0.0
    """It said that it is overloaded until then (monotonic)."""
    retired: bool = False
    """Its address is gone: calls in flight may end, none is added."""
    wanted: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when it may be away, or lack the weights published last."""
    keeper: asyncio.Task[None] | None = None

    def has(self, needed: WeightsVersion | None, *, or_later: bool) -> bool:
        """Whether a call under these weights (None = any published ones) can be sent there."""
        if self.state is not ReplicaState.USABLE or self.holds is None:
            return False
        return needed is None or self.holds == needed or (or_later and self.holds.is_after(needed))

    def is_full(self) -> bool:
        """Whether it asked to be left alone for a while."""
        return time.monotonic() < self.full_until

    async def close(self) -> None:
        """Stop bringing it weights, and end its calls."""
        if self.keeper is not None:
            self.keeper.cancel()
            await asyncio.gather(self.keeper, return_exceptions=True)
        await asyncio.gather(self.client.close(), self.publisher.close())
