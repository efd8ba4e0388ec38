from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from trainer.report.thinning import envelope, spread, stretches

VALUES = st.lists(st.none() | st.floats(-1e6, 1e6), min_size=1, max_size=300)


@given(VALUES, st.integers(2, 50))
def test_an_envelope_keeps_points_as_they_are_with_both_ends_and_every_extreme(
    values: list[float | None], most: int
) -> None:
    whole = list(enumerate(values))
    thin = envelope(whole, most=most)

    assert len(thin) <= most + 2
    assert set(thin) <= set(whole)
    assert thin == sorted(thin, key=lambda point: point[0])
    assert (thin[0], thin[-1]) == (whole[0], whole[-1])
    defined, kept = ([value for _, value in each if value is not None] for each in (whole, thin))
    if defined:
        assert (min(kept), max(kept)) == (min(defined), max(defined))


@given(VALUES, st.integers(2, 50))
def test_every_stretch_of_a_thinned_curve_keeps_its_own_extremes_or_its_gap(
    values: list[float | None], most: int
) -> None:
    thin = dict(envelope(list(enumerate(values)), most=most))
    for start, end in stretches(len(values), most // 2):
        here = [value for value in values[start:end] if value is not None]
        kept = [thin[index] for index in range(start, end) if index in thin]
        assert kept
        if here:
            assert {min(here), max(here)} <= set(kept)


@given(st.integers(1, 500), st.integers(1, 50))
def test_stretches_tile_what_they_cut(count: int, most: int) -> None:
    cut = stretches(count, most)
    assert [index for start, end in cut for index in range(start, end)] == list(range(count))
    assert len(cut) <= most


@given(st.sets(st.integers(0, 10_000), max_size=200), st.integers(2, 20))
def test_spread_steps_are_few_and_hold_both_ends(steps: set[int], most: int) -> None:
    ordered = sorted(steps)
    chosen = spread(ordered, most=most)
    assert len(chosen) == min(len(ordered), most)
    assert set(chosen) <= steps
    assert chosen[:1] + chosen[-1:] == ordered[:1] + ordered[-1:]
