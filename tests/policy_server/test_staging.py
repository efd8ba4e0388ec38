"""The proof that every byte of a tensor came exactly once, against a plain array of bytes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from policy_server.staging import Coverage

SIZE = 24
CLAIMS = st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(1, 6), st.integers(0, 2), st.booleans()), max_size=40)


@given(CLAIMS)
def test_coverage_agrees_with_a_plain_array(claims: list[tuple[int, int, int, bool]]) -> None:
    coverage = Coverage(SIZE)
    owners: list[int | None] = [None] * SIZE
    for start, length, part, release in claims:
        end = min(start + length, SIZE)
        free = all(owner is None for owner in owners[start:end])
        assert coverage.claim(start, end, part) is free
        if free:
            owners[start:end] = [part] * (end - start)
        if release:
            coverage.release(part)
            owners = [None if owner == part else owner for owner in owners]
        assert coverage.first_missing() == (owners.index(None) if None in owners else None)


def test_pieces_in_order_are_remembered_as_one() -> None:
    coverage = Coverage(10_000)
    for start in range(0, 10_000, 10):
        assert coverage.claim(start, start + 10, 0)

    assert coverage.first_missing() is None
    assert len(coverage._spans) == 1
