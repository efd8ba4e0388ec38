"""When two outcomes count as the same."""

from __future__ import annotations

import math
from collections.abc import Sequence

from google.protobuf import text_format

from reward_server.conformance.case import Broken
from reward_server.conformance.exchange import Exchange
from rlhf.reward.v1 import reward_pb2

Results = Sequence[reward_pb2.SampleResult]

# Batching changes the last bits of what a network computes, in half precision more than the last.
_RELATIVE = 1e-2
_ABSOLUTE = 1e-3
_SHOWN_CHARACTERS = 120


def alike(one: reward_pb2.SampleResult, other: reward_pb2.SampleResult) -> bool:
    """Whether two samples were judged the same, as far as a network in other company gives the same numbers."""
    if kind(one) != kind(other):
        return False
    if one.HasField("failed"):
        return one.failed.code == other.failed.code
    first, second = one.scored, other.scored
    return (
        _close(first.reward, second.reward)
        and first.components.keys() == second.components.keys()
        and all(_close(value, second.components[name]) for name, value in first.components.items())
        and len(first.token_rewards) == len(second.token_rewards)
        and all(map(_close, first.token_rewards, second.token_rewards))
    )


def all_alike(ones: Results, others: Results) -> bool:
    """Whether two lists of results, of the same contents in the same order, are alike."""
    return all(alike(one, other) for one, other in zip(ones, others, strict=True))


def expect_alike(expected: Results, results: Results, what: str, exchange: Exchange | None) -> None:
    """Raises Broken for the first result that is not like the expected one; `what` says what should not matter."""
    for one, other in zip(expected, results, strict=True):
        if not alike(one, other):
            raise Broken(f"{what}: {shown(one)} became {shown(other)}", exchange, alone=False)


def kind(result: reward_pb2.SampleResult) -> str:
    """The name of its outcome."""
    return str(result.WhichOneof("outcome") or "unset")


def shown(result: reward_pb2.SampleResult) -> str:
    """Its outcome in a short line."""
    name = result.WhichOneof("outcome")
    if name is None:
        return "unset"
    text = text_format.MessageToString(getattr(result, name), as_one_line=True)
    return f"{name} {{ {text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + '…'} }}"


def _close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=_RELATIVE, abs_tol=_ABSOLUTE)
