from __future__ import annotations

import pytest
from rlhf.reward.v1 import reward_pb2

from sample import Unjudgeable, check, fingerprint, reference_answer

JSON = frozenset({"answer"})


def sample(**fields: object) -> reward_pb2.Sample:
    return reward_pb2.Sample(**{"sample_id": "a", "group_id": "g", "completion": "42", **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "stands_for"),
    [('"42"', "42"), (r'"\u0034\u0032\n"', "42\n"), (" 42\n", " 42\n"), ("[1]", "[1]"), ("1" * 5000, "1" * 5000)],
)
def test_a_json_string_stands_for_its_content_and_other_json_for_its_text(text: str, stands_for: str) -> None:
    assert reference_answer(sample(metadata={"answer": text}), "answer", JSON) == stands_for


def test_a_column_that_is_not_listed_is_plain_text() -> None:
    assert reference_answer(sample(metadata={"answer": "null"}), "answer", frozenset({"other"})) == "null"


@pytest.mark.parametrize("metadata", [{}, {"answer": "null"}])
def test_no_value_and_json_null_are_missing(metadata: dict[str, str]) -> None:
    with pytest.raises(Unjudgeable, match="'answer'") as caught:
        reference_answer(sample(metadata=metadata), "answer", JSON)
    assert caught.value.code == "MISSING_METADATA"


@pytest.mark.parametrize("text", ["", "nope", "NaN", "[1,]", "'a'", "01", "42\x00", "[" * 100_000])
@pytest.mark.parametrize("column", ["answer", "k" * 5000])
def test_what_is_not_json_where_the_call_says_so_fails(column: str, text: str) -> None:
    with pytest.raises(Unjudgeable) as caught:
        check(sample(metadata={column: text}), frozenset({column}))
    assert caught.value.code == "INVALID_METADATA"
    assert len(str(caught.value).encode()) <= 1024
    check(sample(metadata={column: text}), frozenset())


@pytest.mark.parametrize("extra", ["[1]", "{", '"name"'])
def test_extra_json_has_to_be_an_object(extra: str) -> None:
    with pytest.raises(Unjudgeable) as caught:
        check(sample(messages=[reward_pb2.ChatMessage(role="tool", extra_json=extra)]), JSON)
    assert caught.value.code == "INVALID_METADATA"


def test_a_part_of_an_unknown_kind_is_not_skipped() -> None:
    parts = [reward_pb2.ContentPart(text="see:"), reward_pb2.ContentPart()]
    with pytest.raises(Unjudgeable) as caught:
        check(sample(messages=[reward_pb2.ChatMessage(role="user", parts=parts, extra_json="{}")]), JSON)
    assert caught.value.code == "UNKNOWN_CONTENT"


def test_the_fingerprint_is_of_all_but_the_group() -> None:
    first = fingerprint(sample(metadata={"answer": "1", "row": "2"}), JSON)
    assert fingerprint(sample(metadata={"row": "2", "answer": "1"}, group_id="h", group_size=8), JSON) == first
    assert fingerprint(sample(metadata={"row": "2", "answer": "1"}), JSON | {"absent"}) == first
    others = [
        fingerprint(sample(metadata={"answer": "1", "row": "2"}), frozenset()),
        fingerprint(sample(metadata={"answer": "1", "row": "2"}), JSON | {"row"}),
        fingerprint(sample(metadata={"answer": "1", "row": "3"}), JSON),
        fingerprint(sample(metadata={"answer": "1", "row": "2"}, prompt="?"), JSON),
        fingerprint(sample(metadata={"answer": "1", "row": "2"}, finish_reason=1), JSON),
    ]
    assert len({first, *others}) == 1 + len(others)
