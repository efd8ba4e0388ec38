"""The kinds of reward. A kind turns samples into outcomes; the service does everything that concerns the wire."""

from __future__ import annotations

import abc
import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from reward_server.memory import SampleKey
from reward_server.results import Outcome
from rlhf.reward.v1 import reward_pb2


class RewardLoadError(Exception):
    """The reward that was asked for cannot be had; the message is for the person who asked."""


@dataclass(slots=True)  # not frozen: that triples the time to make one
class Sample:
    """One completion to judge, decoded: `metadata` values are strings or what their JSON text meant.

    messages: chat turns as {"role": …, "content": …} mappings, empty when the prompt is not a chat.
    sampled_ranges: [first, past_last) pairs of `completion_ids`; empty = all of them were sampled by the policy.
    fingerprint: equal for two samples exactly when all that a score may depend on is equal.
    message, json_keys: the sample as it came, for kinds that pass it on.
    """

    prompt: str
    completion: str
    completion_ids: Sequence[int] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    messages: Sequence[Mapping[str, Any]] = ()
    sampled_ranges: Sequence[tuple[int, int]] = ()
    key: SampleKey = field(default_factory=lambda: SampleKey("", ""))
    group_id: str = ""
    fingerprint: bytes = b""
    message: reward_pb2.Sample = field(default_factory=reward_pb2.Sample)
    json_keys: frozenset[str] = frozenset()


class Scope(enum.Enum):
    """What a score depends on: the sample alone, or the other samples of its group too."""

    SAMPLE = enum.auto()
    GROUP = enum.auto()


@dataclass(frozen=True)
class Description:
    """What clients must know about a reward before they call it; constant while the process lives.

    remembers: seconds for which final outcomes are kept, over restarts too; None = not promised.
    """

    name: str
    version: str
    required_metadata: tuple[str, ...] = ()
    needs_token_ids: bool = False
    scope: Scope = Scope.SAMPLE
    remembers: float | None = None


@dataclass(frozen=True)
class Limits:
    """How much a reward may do at once, out of the server's settings; every child of a composite has the same.

    batch_size: most samples in one call of `RewardKind.score`. max_queue_samples: samples that wait or run.
    remember_samples: final outcomes kept. threads: calls at once of what blocks. concurrency: of what does not.
    """

    batch_size: int = 64
    max_queue_samples: int = 4096
    remember_samples: int = 65536
    threads: int = 1
    concurrency: int = 8


class RewardKind(abc.ABC):
    """Turns samples into outcomes. `start` comes first, `close` last; `description` is known once started."""

    kind: ClassVar[str]
    """Its name among the kinds, a label of metrics."""

    description: Description
    concurrency: int
    """How many `score` calls are useful at once; no more are made."""
    batch_size: int
    """Most samples that one `score` call takes. With 1, a slow sample delays no other."""
    stoppable: bool = True
    """Whether cancelling `score` ends its work; a thread that runs cannot be ended."""

    # Both may stay as they are, so they are not abstract.
    async def start(self) -> None:  # noqa: B027
        """Load or connect, for as long as it takes; raises RewardLoadError for what waiting does not mend."""

    async def close(self) -> None:  # noqa: B027
        """Give back what `start` took; nothing is judged any more."""

    @abc.abstractmethod
    async def score(self, samples: Sequence[Sample], answer_by: float | None) -> list[Outcome]:
        """One outcome per sample, in order; never raises for what a sample contains.

        answer_by: the time.monotonic() at which the caller is told PENDING; None = it waits for ever. Work may go on
        beyond it, since the caller comes back, but a call to another server ends by then. An RpcFailure that is raised
        becomes the status of the whole call.
        """
