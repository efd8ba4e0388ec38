"""Each rule on a run that it means, and on the nearest that it doesn't."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from tests.trainer.report.folders import evaluation, run_of, step
from trainer.report import notes
from trainer.report.notes import Rule
from trainer.report.reading import Drop, Run, Sample


def steps(name: str, values: Sequence[float | None], **more: Any) -> Run:
    return run_of([step(at, **{name: value}) for at, value in enumerate(values, 1)], **more)


def evaluations(**columns: Sequence[float | None]) -> Run:
    rows = zip(*columns.values(), strict=True)
    return run_of(
        evaluations=[evaluation(10 * at, **dict(zip(columns, row, strict=True))) for at, row in enumerate(rows)]
    )


def completions(*finish_reasons: str) -> Run:
    samples = [
        Sample("evaluation", at, row, "p", "c", None, {}, 1, reason)
        for at, reasons in ((0, ("length",) * 4), (5, finish_reasons))
        for row, reason in enumerate(reasons)
    ]
    return run_of(samples=samples)


ADAPTIVE = {"adap_kl_ctrl": True, "target": 6.0}
DROPS = [Drop("failed", "NOT_FINITE", 3, "")]

CASES: list[tuple[Rule, Run, str, Run]] = [
    (
        notes.negative_kl,
        steps("objective__kl", [-3.0] * 12 + [1.0] * 13),
        "KL estimate is negative in 12 of 25 steps (lowest -3.00 nats",
        steps("objective__kl", [-3.0, -3.0, -0.01, -0.01, -0.01] + [1.0] * 20),
    ),
    (
        notes.high_kl,
        steps("objective__kl", [0.0, 5.0, 12.0, 13.0], settings=ADAPTIVE),
        "KL is 13.0 nats",
        steps("objective__kl", [0.0, 5.0, 13.0, 12.0], settings=ADAPTIVE),
    ),
    (
        notes.few_distinct,
        evaluations(distinct_fraction=[0.9, 0.31]),
        "Distinct completions fell below 50 %: from 90% to 31%",
        evaluations(distinct_fraction=[0.4, 0.31]),
    ),
    (
        notes.reward_with_length,
        evaluations(reward_mean=[0.1, 0.9], length_mean=[20.0, 9.0]),
        "while the mean length fell from 20.0 to 9.0 tokens",
        evaluations(reward_mean=[0.1, 0.9], length_mean=[20.0, 11.0]),
    ),
    (
        notes.reward_with_length,
        evaluations(reward_mean=[0.1, 0.9], length_mean=[20.0, 50.0]),
        "while the mean length grew from 20.0 to 50.0 tokens",
        evaluations(reward_mean=[0.9, 0.1], length_mean=[20.0, 50.0]),
    ),
    (
        notes.past_its_best,
        evaluations(reward_mean=[0.0, 0.8, 0.6]),
        "best at step 10 (0.8) and is 0.6",
        evaluations(reward_mean=[0.0, 0.8, 0.7]),
    ),
    (
        notes.logprob_gap,
        steps("rollout__logprob_gap_mean", [0.001, 0.2]),
        "by up to 0.2 nats per token",
        steps("rollout__logprob_gap_mean", [0.001, 0.02]),
    ),
    (
        notes.skipped_minibatches,
        steps("ppo__policy__skipped", [0.0, 0.25]),
        "In 1 of 2 steps mini-batches were skipped",
        steps("ppo__policy__skipped", [0.0, 0.0]),
    ),
    (
        notes.blind_value_head,
        steps("ppo__val__var_explained", [0.5, 0.1, -0.1, -0.2]),
        "Explained variance stayed at or below 0",
        steps("ppo__val__var_explained", [-0.5, -0.1, -0.1, 0.2]),
    ),
    (
        notes.lost_entropy,
        steps("ppo__policy__entropy", [4.0, 3.0, 2.0, 0.9]),
        "Entropy fell from 4.00 to 0.90",
        steps("ppo__policy__entropy", [4.0, 3.0, 2.0, 1.1]),
    ),
    (
        notes.cut_by_length,
        completions("length", "length", "eos"),
        "2 of 3 held-out completions of step 5 were cut",
        completions("length", "eos"),
    ),
    (
        notes.many_drops,
        run_of([step(1, samples__trained=7, samples__dropped=3)], drops=DROPS),
        "30% of the prompts drawn were dropped, mostly failed NOT_FINITE.",
        run_of([step(1, samples__trained=97, samples__dropped=3)], drops=DROPS),
    ),
    (
        notes.steps_without_update,
        run_of([step(1, samples__trained=0), step(2, samples__trained=8)]),
        "1 of 2 steps had no sample",
        run_of([step(1, samples__trained=8)]),
    ),
]


@pytest.mark.parametrize(
    ("rule", "suspicious", "words", "usual"), CASES, ids=[f"{rule.__name__}-{n}" for n, (rule, *_) in enumerate(CASES)]
)
def test_a_rule_speaks_of_what_it_means_and_of_nothing_near_it(
    rule: Rule, suspicious: Run, words: str, usual: Run
) -> None:
    assert words in (rule(suspicious) or "")
    assert rule(usual) is None


def test_every_rule_has_a_case_and_says_nothing_of_a_run_without_numbers() -> None:
    assert {rule for rule, *_ in CASES} == set(notes.RULES)
    assert notes.notes(run_of()) == []
    undefined = run_of([step(at, objective__kl=None, ppo__policy__entropy=None) for at in range(1, 9)])
    assert notes.notes(undefined) == []


def test_without_two_evaluations_training_steps_speak() -> None:
    run = run_of([step(1, rollout__distinct_fraction=1.0), step(2, rollout__distinct_fraction=0.2)])
    assert "from 100% to 20%" in (notes.few_distinct(run) or "")
