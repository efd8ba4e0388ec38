from __future__ import annotations

import pytest

from tests.trainer.report.folders import evaluation, run_of, step
from trainer.report.charts import MOST_POINTS, Chart, seconds_by_phase, sections
from trainer.report.reading import Run


def charts(*runs: Run) -> dict[str, Chart]:
    return {chart.name: chart for section in sections(runs) for chart in section.charts}


def test_training_and_held_out_share_a_chart_and_tell_their_ends_and_extremes() -> None:
    run = run_of(
        [step(1, reward_mean=0.5), step(2, reward_mean=None), step(3, reward_mean=0.25)],
        [evaluation(0, reward_mean=0.1)],
    )
    trained, held_out = charts(run)["reward_mean"].curves

    assert trained.points == [(1, 0.5), (2, None), (3, 0.25)]
    assert trained.told == "training: 0.5 → 0.25, lowest 0.25 (step 3), highest 0.5 (step 1)"
    assert (held_out.points, held_out.held_out) == ([(0, 0.1)], True)


def test_only_numbers_that_a_run_has_get_a_chart() -> None:
    without = charts(run_of([step(1, reward_mean=1.0, rollout__staleness_mean=None)]))
    assert list(without) == ["reward_mean"]
    names = ("rollout/staleness_mean", "rollout/staleness_max", "ppo/policy/importance_clipped")
    stale = charts(run_of([{**step(1), **dict.fromkeys(names, 1.0)}]))
    assert list(stale) == [name.replace("/", "-") for name in names]


def test_two_runs_share_axes_and_differ_in_style() -> None:
    first, second = (run_of([step(1, reward_mean=value)], [evaluation(0, reward_mean=value)]) for value in (1.0, 2.0))
    curves = charts(first, second)["reward_mean"].curves
    assert [(curve.points[0][1], curve.style, curve.held_out) for curve in curves] == [
        (1.0, 0, False),
        (1.0, 0, True),
        (2.0, 1, False),
        (2.0, 1, True),
    ]


def test_of_many_steps_the_one_that_stands_out_is_drawn() -> None:
    many = run_of([step(at, reward_mean=9.0 if at == 4321 else 0.0) for at in range(1, 10_001)])
    (curve,) = charts(many)["reward_mean"].curves
    assert len(curve.points) <= MOST_POINTS + 2
    assert (4321, 9.0) in curve.points


def test_a_step_without_drops_of_a_reason_has_none_of_them() -> None:
    run = run_of([step(1, samples__dropped_failed=2), step(2)])
    (curve,) = charts(run)["dropped-0"].curves
    assert (curve.label, curve.points) == ("failed", [(1, 2.0), (2, 0.0)])


def test_time_is_told_by_phase_and_what_is_left_over() -> None:
    run = run_of(
        [step(1, time__rollout=2.0, time__learn=5.0, time__publish=1.0, time__step=8.5), step(2, time__checkpoint=3.0)],
        [evaluation(0, seconds=4.0), evaluation(2, seconds=1.0)],
    )
    assert seconds_by_phase(run) == pytest.approx(
        {"rollout": 2.0, "learn": 5.0, "publish": 1.0, "evaluate": 5.0, "checkpoint": 3.0, "other": 0.5}
    )
    phases = {curve.label: curve.points for curve in charts(run)["phases-0"].curves}
    assert phases["evaluate"] == [(1, 0.0), (2, 1.0)]
    assert phases["checkpoint"] == [(1, 0.0), (2, 3.0)]
