"""Which replica a call goes to."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Collection
from dataclasses import dataclass, field

from trainer.clients.replica import Replica, ReplicaState
from trainer.versions import WeightsVersion


@dataclass(eq=False)
class Place:
    """A call that waits for a replica that has the weights it needs (None = any that were published)."""

    needed: WeightsVersion | None
    or_later: bool
    generates: bool
    replica: asyncio.Future[Replica] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


def best_for(place: Place, replicas: Collection[Replica], concurrency: int) -> Replica | None:
    """The one with the fewest calls in flight among those that can take it now.

    `concurrency` Generate calls in flight are shared evenly by the replicas that answer: what a slow one does not take
    waits for whoever is free first.
    """
    answering = [replica for replica in replicas if replica.state is ReplicaState.USABLE]
    share = math.ceil(concurrency / max(1, len(answering)))
    free = [
        replica
        for replica in answering
        if replica.has(place.needed, or_later=place.or_later)
        and not replica.is_full()
        and (replica.generating < share or not place.generates)
    ]
    return min(free, key=lambda replica: replica.in_flight, default=None)


def why_nobody_answers(replicas: Collection[Replica]) -> tuple[str, str] | None:
    """Targets and reasons if all are away, refused or overloaded; None if a call only has to wait for its turn."""
    if any(replica.state is ReplicaState.USABLE and not replica.is_full() for replica in replicas):
        return None
    if len(replicas) == 1:
        (replica,) = replicas
        return replica.target, replica.why
    targets = ", ".join(replica.target for replica in replicas)
    return targets, "; ".join(f"{replica.target}: {replica.why}" for replica in replicas)
