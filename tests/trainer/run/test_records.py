"""What a run writes down about prompts and numbers."""

from __future__ import annotations

import math

import torch

from trainer.clients.policy import FinishReason, Generation
from trainer.clients.rewards import Abstained, Failed, Outcome, Scored
from trainer.run.heldout import summarize
from trainer.run.prompts import Cursor, Draw, DropReason, Prompt, Record
from trainer.run.records import accounting_lines, scalars
from trainer.run.rollouts import Rollout
from trainer.versions import WeightsVersion


def prompt(row: int) -> Prompt:
    return Prompt(Record(row, f"prompt {row}"), f"prompt {row}", (1, 2))


def rollout(row: int, outcome: Outcome | None, tokens: tuple[int, ...] = (5, 6), logprob: float = -1.0) -> Rollout:
    generation = Generation(
        token_ids=tokens,
        logprobs=(logprob,) * len(tokens),
        text="text",
        finish_reason=FinishReason.EOS,
        seed=0,
        versions=(WeightsVersion("run", 1, 7),) if tokens else (),
    )
    return Rollout(row, prompt(row), generation, f"sample {row}", outcome, None)


def test_every_prompt_drawn_is_accounted_for_once_with_the_reason() -> None:
    draws = [
        Draw(Cursor(0, 0), prompt(10)),
        Draw(Cursor(0, 1), prompt(11), DropReason.PROMPT_TOO_LONG),
        Draw(Cursor(0, 2), prompt(12)),
        Draw(Cursor(1, 0), prompt(13)),
        Draw(Cursor(1, 1), prompt(14)),
        Draw(Cursor(1, 2), prompt(15)),
    ]
    rollouts = [
        rollout(0, Scored(1.0)),
        rollout(1, Failed("NO_COLUMN", "stars is missing")),
        rollout(2, Abstained("not English")),
        rollout(3, None, tokens=()),
        None,
    ]

    lines = accounting_lines(4, draws, rollouts)

    assert [line["row"] for line in lines] == [10, 11, 12, 13, 14, 15]
    assert [line["outcome"] for line in lines] == ["trained", *["dropped"] * 5]
    assert [line.get("reason") for line in lines] == [
        None,
        "prompt_too_long",
        "failed",
        "abstained",
        "empty_completion",
        "straggler",
    ]
    assert [line.get("versions") for line in lines] == [[7], None, [7], [7], None, None]
    assert [line.get("code") for line in lines] == [None, None, "NO_COLUMN", None, None, None]
    assert [line.get("said") for line in lines] == [None, None, "stars is missing", "not English", None, None]
    assert {line["step"] for line in lines} == {4}


def test_statistics_become_numbers_or_null_and_lists_stay_out() -> None:
    statistics = {"a": 1, "b": torch.tensor(2.5), "c": math.nan, "d": torch.tensor([1.0, 2.0]), "e": [torch.ones(2)]}

    assert scalars(statistics) == {"a": 1.0, "b": 2.5, "c": None}


def test_the_held_out_summary_is_about_sequences() -> None:
    rollouts = [
        rollout(0, Scored(1.0), tokens=(1, 2), logprob=-1.0),
        rollout(1, Scored(0.0), tokens=(1, 2), logprob=-1.0),
        rollout(2, Abstained(""), tokens=(3, 4, 5, 6), logprob=-0.5),
        rollout(3, None, tokens=()),
    ]

    result = summarize(rollouts, [(-2.0, -2.0), (-1.0, -1.0), (-1.0, -1.0, -1.0, -1.0), None])

    assert result.reward_mean == 0.5
    assert result.kl_mean == (2.0 + 0.0 + 2.0) / 3
    assert result.distinct_fraction == 3 / 4
    assert result.length_mean == 2.0
    assert (result.judged, result.prompts) == (2, 4)
