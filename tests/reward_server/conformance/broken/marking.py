"""How a broken server says which case has to catch it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from tests.reward_server.conformance.right_server import RightServer, Sample, SampleResult

S = TypeVar("S", bound=type[RightServer])

BROKEN: list[tuple[str, type[RightServer]]] = []
"""Case ids, and servers that break the sentence of that case and no other."""


def caught_by(case_id: str) -> Callable[[S], S]:
    def register(server: S) -> S:
        BROKEN.append((case_id, server))
        return server

    return register


class NeedsTiming(RightServer):
    """Its fault shows only if calls come within milliseconds of each other, which on a busy machine they may not."""

    showed = False


class NeverLate(RightServer):
    """Nothing is PENDING, for faults that would show in two ways otherwise."""

    def is_late(self, sample: Sample) -> bool:
        return False


def renamed(result: SampleResult, sample_id: str) -> SampleResult:
    copy = SampleResult()
    copy.CopyFrom(result)
    copy.sample_id = sample_id
    return copy
