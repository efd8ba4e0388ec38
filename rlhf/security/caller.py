"""Who makes the call that runs, and what it may still use of its quota."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

from rlhf.failures import overloaded
from rlhf.metrics import QUOTA_REFUSED, QUOTA_SPENT
from rlhf.security.quota import Bucket
from rlhf.security.roles import Role

_SHORTEST_RETRY_SECONDS = 0.1

_caller: ContextVar[Caller | None] = ContextVar("caller", default=None)


@dataclass(frozen=True)
class Caller:
    """An identity of the access file; bucket: None = no quota."""

    name: str
    roles: frozenset[Role]
    bucket: Bucket | None = None


@dataclass
class Spending:
    """What a call has used of what it took."""

    used: int = 0


def current_caller() -> Caller | None:
    """Who makes the call that this task answers; None = the server asks nobody who they are."""
    return _caller.get()


@contextlib.contextmanager
def called_by(caller: Caller | None) -> Iterator[None]:
    """What runs inside, in this task and those it starts, answers `caller`."""
    token = _caller.set(caller)
    try:
        yield
    finally:
        _caller.reset(token)


@contextlib.contextmanager
def spending(units: int) -> Iterator[Spending]:
    """Take at most `units` of the caller's quota; what is not counted in `used` by the end is given back.

    Raises overloaded, with the time to come back, when the quota does not have them now.
    """
    spent = Spending()
    caller = current_caller()
    if caller is None or caller.bucket is None:
        yield spent
        return
    seconds = caller.bucket.take(units)
    if seconds:
        QUOTA_REFUSED.labels(caller.name).inc()
        raise overloaded(f"the quota of {caller.name} is used up", max(seconds, _SHORTEST_RETRY_SECONDS))
    try:
        yield spent
    finally:
        caller.bucket.give_back(units - spent.used)
        QUOTA_SPENT.labels(caller.name).inc(spent.used)
