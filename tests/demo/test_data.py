from __future__ import annotations

import json
from pathlib import Path

from demo.corpus import Review
from demo.data import halves, split_reviews, write_prompts

REVIEWS = [Review(i, i / 100, " ".join(f"word{i % 7}{j}" for j in range(i % 30))) for i in range(300)]


def test_the_split_is_the_same_every_time_and_leaves_nothing_out() -> None:
    split = split_reviews(REVIEWS, held_out=50)
    assert split == split_reviews(REVIEWS, held_out=50)
    assert len(split.held_out) == 50
    assert sorted(review.id for review in split.train + split.held_out) == list(range(300))


def test_prompts_are_first_words_and_leave_something_to_write() -> None:
    for review in REVIEWS:
        both = halves(review)
        if both is None:
            assert len(review.text.split()) < 10
        else:
            prompt, answer = both
            assert f"{prompt} {answer}" == " ".join(review.text.split())
            assert 4 <= len(prompt.split()) <= 6
            assert len(answer.split()) >= 4


def test_no_prompt_of_the_evaluation_is_trained_on(tmp_path: Path) -> None:
    files = write_prompts(tmp_path, split_reviews(REVIEWS, held_out=100), evaluation_prompts=20)
    train = [json.loads(line) for line in files.train.read_text().splitlines()]
    evaluation = [json.loads(line) for line in files.evaluation.read_text().splitlines()]
    assert 0 < len(evaluation) <= 20
    assert set(train[0]) == {"prompt", "answer", "rating", "id"}
    prompts = [row["prompt"] for row in train + evaluation]
    assert len(set(prompts)) == len(prompts)
