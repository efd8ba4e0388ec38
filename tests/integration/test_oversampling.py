"""A run that draws more prompts than it trains on, and says what that costs."""

from __future__ import annotations

import pytest

from tests.integration.training import World, assert_accounted_once, assert_finished

STEPS, BATCH, DRAWN = 3, 8, 12


def test_stragglers_are_dropped_by_name_and_the_bias_is_told(world: World) -> None:
    trainer = world.trainer("oversampled", reproducible=False, oversample=0.5, steps=STEPS, rollout_concurrency=DRAWN)
    assert_finished(trainer)

    assert_accounted_once(world, "oversampled")
    lines = world.lines("oversampled", "accounting.jsonl")
    evaluation, *_ = world.lines("oversampled", "metrics.jsonl", "evaluation")
    for step in world.lines("oversampled", "metrics.jsonl", "step"):
        of_step = [line for line in lines if line["step"] == step["step"]]
        assert len(of_step) == DRAWN
        assert sum(line["outcome"] == "trained" for line in of_step) == BATCH
        assert {line["reason"] for line in of_step if line["outcome"] == "dropped"} == {"straggler"}
        assert step["samples/dropped_straggler"] == DRAWN - BATCH
        assert step["rollout/straggler_fraction"] == pytest.approx((DRAWN - BATCH) / DRAWN)
        assert step["tokens/responses_len_mean"] == pytest.approx(step["rollout/length_mean"])
    first = world.lines("oversampled", "metrics.jsonl", "step")[0]
    bias = first["rollout/length_mean"] - evaluation["length_mean"]
    assert first["rollout/straggler_length_bias"] == pytest.approx(bias)
