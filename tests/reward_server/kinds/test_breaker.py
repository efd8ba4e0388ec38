"""The circuit breaker: when calls are made, and what counts as a failure."""

from __future__ import annotations

import asyncio
import time

import pytest

from reward_server import metrics
from reward_server.kinds.breaker import Circuit, CircuitBreaker, CircuitOpenError
from rlhf.failures import RpcFailure, internal, overloaded, unavailable
from tests.reward_server.conftest import until

AWAY = unavailable("away")


def breaker(*, failures: int = 2, cool_down: float = 60.0) -> CircuitBreaker:
    return CircuitBreaker("test", "somewhere", failures=failures, cool_down=cool_down)


def call(circuit: CircuitBreaker, failure: BaseException | None = None) -> None:
    with circuit.call():
        if failure is not None:
            raise failure


def fail(circuit: CircuitBreaker, failure: RpcFailure = AWAY) -> None:
    with pytest.raises((RpcFailure, CircuitOpenError)):
        call(circuit, failure)


async def half_open(circuit: CircuitBreaker) -> None:
    """Let the cool-down pass."""
    await until(lambda: circuit._open_until < time.monotonic())


def test_it_opens_after_failures_in_a_row_and_makes_no_call() -> None:
    circuit = breaker()
    fail(circuit)
    call(circuit)
    fail(circuit)
    assert circuit.state is Circuit.CLOSED
    with pytest.raises(CircuitOpenError) as opened:
        call(circuit, AWAY)
    assert 0 < opened.value.retry_after <= 60
    assert circuit.state is Circuit.OPEN
    with pytest.raises(CircuitOpenError):
        call(circuit, AssertionError("the call was made"))


@pytest.mark.parametrize("failure", [overloaded("busy", 3.0), unavailable("loading", 3.0), internal("a bug")])
def test_a_server_that_answers_at_all_is_not_away(failure: RpcFailure) -> None:
    circuit = breaker(failures=1)
    with pytest.raises(RpcFailure, match=failure.message):
        call(circuit, failure)
    assert circuit.state is Circuit.CLOSED


async def test_one_call_probes_after_the_cool_down_and_closes_it() -> None:
    circuit = breaker(failures=1, cool_down=0.02)
    fail(circuit)
    await half_open(circuit)
    with circuit.call():
        assert circuit.state is Circuit.HALF_OPEN
        with pytest.raises(CircuitOpenError):
            call(circuit)
    assert circuit.state is Circuit.CLOSED
    call(circuit)


async def test_a_probe_that_fails_opens_it_again() -> None:
    circuit = breaker(failures=3, cool_down=0.02)
    for _ in range(3):
        fail(circuit)
    await half_open(circuit)
    fail(circuit)
    assert circuit.state is Circuit.OPEN


async def test_a_probe_that_is_given_up_leaves_its_place_to_the_next_call() -> None:
    circuit = breaker(failures=1, cool_down=0.02)
    fail(circuit)
    await half_open(circuit)
    with pytest.raises(asyncio.CancelledError):
        call(circuit, asyncio.CancelledError())
    assert circuit.state is Circuit.OPEN
    call(circuit)
    assert circuit.state is Circuit.CLOSED


def test_its_state_is_a_metric() -> None:
    circuit = breaker(failures=1)
    gauge = metrics.CIRCUIT_STATE.labels("test", "somewhere")
    assert gauge._value.get() == 0
    fail(circuit)
    assert gauge._value.get() == 2
