"""Quotas, by a clock that the test turns."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from rlhf.failures import RpcFailure
from rlhf.security.caller import Caller, called_by, spending
from rlhf.security.quota import Bucket
from rlhf.security.roles import Role


class Clock:
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def bucket(clock: Clock) -> Bucket:
    return Bucket(per_second=10, burst=100, clock=clock)


@pytest.fixture
def caller(bucket: Bucket) -> Iterator[Caller]:
    caller = Caller("chat", frozenset({Role.APP}), bucket)
    with called_by(caller):
        yield caller


def test_a_burst_is_taken_at_once_and_then_the_rate_holds(bucket: Bucket, clock: Clock) -> None:
    assert bucket.take(100) == 0
    assert bucket.take(50) == pytest.approx(5)
    clock.seconds = 5
    assert bucket.take(50) == 0


def test_a_refused_take_takes_nothing(bucket: Bucket) -> None:
    bucket.take(90)
    assert bucket.take(20) > 0
    assert bucket.take(10) == 0


def test_more_than_ever_fits_is_taken_from_a_full_bucket_which_owes_it(bucket: Bucket, clock: Clock) -> None:
    assert bucket.take(150) == 0
    assert bucket.take(1) == pytest.approx(5.1)
    clock.seconds = 5.1
    assert bucket.take(1) == 0


def test_a_bucket_never_holds_more_than_its_burst(bucket: Bucket, clock: Clock) -> None:
    clock.seconds = 1000
    bucket.give_back(50)
    assert bucket.take(100) == 0
    assert bucket.take(1) > 0


def test_a_new_rate_keeps_what_is_there(bucket: Bucket) -> None:
    bucket.take(60)
    bucket.set_rate(per_second=1, burst=50)
    assert bucket.take(41) == pytest.approx(1)
    assert bucket.take(40) == 0


def test_what_a_call_does_not_use_is_given_back(caller: Caller) -> None:
    with spending(100) as spent:
        spent.used = 30
    with spending(70):
        pass


def test_what_a_failed_call_used_is_spent(caller: Caller) -> None:
    with contextlib.suppress(RuntimeError), spending(100) as spent:
        spent.used = 60
        raise RuntimeError
    with pytest.raises(RpcFailure), spending(50):
        pass


def test_beyond_the_quota_a_call_is_told_when_to_come_back(caller: Caller) -> None:
    with spending(100), pytest.raises(RpcFailure, match="RESOURCE_EXHAUSTED: the quota of chat") as refused:  # noqa: SIM117
        with spending(20):
            pass
    assert refused.value.retry_after == pytest.approx(2)


def test_who_has_no_quota_may_use_what_they_like() -> None:
    with called_by(Caller("trainer", frozenset({Role.ROLLOUT}))), spending(10**9) as spent:
        spent.used = 10**9
