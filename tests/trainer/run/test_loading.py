"""What is held out of the data, and the learning rate of each step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.trainer.test_settings import settings
from trainer.run.loading import lr_schedule, split_off_held_out
from trainer.run.prompts import Record
from trainer.run.seeds import derive_seed


@given(texts=st.lists(st.sampled_from("abcdefgh"), max_size=40), most=st.integers(0, 8), seed=st.integers(0, 9))
def test_no_prompt_is_both_trained_and_held_out_however_often_it_is_repeated(
    texts: list[str], most: int, seed: int
) -> None:
    records = [Record(row, text) for row, text in enumerate(texts)]

    training, held_out = split_off_held_out(records, most=most, seed=seed)

    assert len(held_out) <= most
    assert {record.prompt for record in training}.isdisjoint(record.prompt for record in held_out)
    assert sorted([*training, *held_out], key=lambda record: record.row) == records


def test_conversations_are_compared_by_what_they_say() -> None:
    turns = [[{"role": "user", "content": text}] for text in "abca"]
    records = [Record(row, prompt) for row, prompt in enumerate(turns)]

    for seed in range(8):
        training, held_out = split_off_held_out(records, most=2, seed=seed)
        assert len({record.row in (0, 3) for record in held_out}) == 1
        assert all(record.prompt not in [other.prompt for other in training] for record in held_out)


def test_prompts_that_are_not_repeated_are_held_out_by_their_rows_alone() -> None:
    records = [Record(row, f"prompt {row}") for row in range(50)]

    training, held_out = split_off_held_out(records, most=10, seed=3)

    by_seed = sorted(range(50), key=lambda row: derive_seed(3, "held out", row))
    assert [record.row for record in held_out] == by_seed[:10]
    assert [record.row for record in training] == sorted(by_seed[10:])


@pytest.mark.parametrize(
    ("name", "warmup", "rates"),
    [
        ("constant", 0, [1, 1, 1, 1, 1]),
        ("constant", 2, [0, 0.5, 1, 1, 1]),
        ("linear", 1, [0, 1, 0.75, 0.5, 0.25]),
        ("cosine", 0, [1, 0.905, 0.655, 0.345, 0.095]),
        ("inverse_sqrt", 1, [0, 1, 0.707, 0.577, 0.5]),
    ],
)
def test_the_learning_rate_follows_its_schedule_step_by_step(name: str, warmup: int, rates: list[float]) -> None:
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=2.0)
    schedule = lr_schedule(settings(lr_scheduler=name, lr_warmup_steps=warmup, steps=5), optimizer)

    seen = []
    for _ in rates:
        seen.append(optimizer.param_groups[0]["lr"] / 2.0)
        optimizer.step()
        schedule.step()

    assert seen == pytest.approx(rates, abs=1e-3)
