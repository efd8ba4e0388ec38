from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from reward_server.kinds import Sample
from reward_server.results import Abstained, Failed, FailureCode, Outcome, Pending
from reward_server.wire import decode, encode, fingerprint
from rlhf.reward.v1 import reward_pb2

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
KEYS = TEXT.filter(lambda key: not key.startswith("rlhf."))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@given(columns=st.dictionaries(KEYS, JSON, max_size=4), strings=st.dictionaries(KEYS, TEXT, max_size=4))
def test_metadata_means_what_the_client_said(columns: dict[str, Any], strings: dict[str, str]) -> None:
    metadata = {**strings, **{key: json.dumps(value) for key, value in columns.items()}}
    decoded = decode("run", reward_pb2.Sample(sample_id="a", metadata=metadata), frozenset(columns))
    assert isinstance(decoded, Sample)
    expected = {**strings, **columns}
    assert decoded.metadata == {key: value for key, value in expected.items() if value is not None}


@given(metadata=st.dictionaries(TEXT, TEXT, max_size=4), keys=st.frozensets(TEXT, max_size=4))
def test_any_metadata_decodes_or_fails_by_code(metadata: dict[str, str], keys: frozenset[str]) -> None:
    decoded = decode("run", reward_pb2.Sample(sample_id="a", metadata=metadata), keys | frozenset(metadata))
    assert isinstance(decoded, Sample) or decoded.code is FailureCode.INVALID_METADATA


@given(st.dictionaries(KEYS.filter(lambda key: key != "unused"), TEXT, max_size=4), st.randoms())
def test_the_fingerprint_does_not_depend_on_order_or_group(metadata: dict[str, str], random: Any) -> None:
    shuffled = list(metadata.items())
    random.shuffle(shuffled)
    one = reward_pb2.Sample(sample_id="a", completion="x", metadata=metadata, group_id="g", group_size=2)
    other = reward_pb2.Sample(sample_id="a", completion="x", metadata=dict(shuffled), group_id="h", group_size=3)
    keys = frozenset(metadata)
    assert fingerprint(one, keys) == fingerprint(other, keys | {"unused"})
    assert (one.group_id, one.group_size) == ("g", 2)


def encoded(outcome: Outcome) -> reward_pb2.SampleResult:
    result = reward_pb2.SampleResult(sample_id="a")
    encode(outcome, result)
    return result


@given(st.text(), st.floats(min_value=1e-12, max_value=1e6))
def test_what_people_read_fits_and_waits_are_above_zero(text: str, seconds: float) -> None:
    for outcome in (Abstained(text * 300), Failed(FailureCode.FUNCTION_RAISED, text * 300)):
        result = encoded(outcome)
        assert len((result.abstained.reason or result.failed.message).encode()) <= 1024
        assert reward_pb2.SampleResult.FromString(result.SerializeToString()) == result
    assert encoded(Pending(seconds)).pending.retry_after.ToNanoseconds() > 0
