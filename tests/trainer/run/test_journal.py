"""The journal: answers that outlive the process, found for the very same sample and for no other."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.disks import files_of_at_most
from trainer.clients.policy import FinishReason
from trainer.clients.rewards import Abstained, Failed, Outcome, RewardSample, Scored
from trainer.run.journal import Journal
from trainer.run.runfolder import StorageError

OUTCOMES: list[Outcome] = [
    Scored(0.1 + 0.2, {"taste": -1e-300}, (0.25, -0.5, 0.0)),
    Scored(0.0),
    Abstained("nicht Englisch ✗"),
    Failed("NO_COLUMN", "stars is missing"),
]


def sample(row: int, *, step: int = 1) -> RewardSample:
    return RewardSample(
        sample_id=f"run/{step}/{row}/abc",
        prompt=f"prompt {row}",
        completion="…",
        completion_ids=(1, 2, 3),
        finish_reason=FinishReason.EOS,
        metadata={"stars": "3"},
        step=step,
    )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "journal.jsonl"


async def keep(file: Path, *outcomes: Outcome, step: int = 1, version: str = "1") -> None:
    async with aclosing(Journal(file, reward_version=version)) as journal:
        await asyncio.gather(*(journal.keep(sample(row, step=step), each) for row, each in enumerate(outcomes)))


async def found(file: Path, *samples: RewardSample, version: str = "1") -> list[Outcome | None]:
    async with aclosing(Journal(file, reward_version=version)) as journal:
        return [journal.find(each) for each in samples]


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


async def test_every_final_outcome_comes_back_as_it_was(file: Path) -> None:
    await keep(file, *OUTCOMES)

    assert await found(file, *(sample(row) for row in range(5))) == [*OUTCOMES, None]


async def test_an_answer_is_in_the_file_when_keep_returns(file: Path) -> None:
    async with aclosing(Journal(file, reward_version="1")) as journal:
        await journal.keep(sample(0), Scored(1.5))
        assert lines_of(file)[0]["outcome"]["scored"]["reward"] == 1.5


async def test_answers_of_a_cancelled_caller_are_written_all_the_same(file: Path) -> None:
    async with aclosing(Journal(file, reward_version="1")) as journal:
        keeping = asyncio.create_task(journal.keep(sample(0), Scored(1.5)))
        await asyncio.sleep(0)
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)

    assert await found(file, sample(0)) == [Scored(1.5)]


async def test_another_text_or_column_under_the_same_id_is_asked_again(file: Path) -> None:
    await keep(file, Scored(1.5))

    others = [
        replace(sample(0), metadata={"stars": "4"}),
        replace(sample(0), prompt="prompt"),
        replace(sample(0), completion="."),
        replace(sample(0), finish_reason=FinishReason.LENGTH),
        replace(sample(0), json_keys=frozenset({"stars"})),
        replace(sample(0), messages=[{"role": "user", "content": "…"}]),
    ]
    assert await found(file, *others) == [None] * len(others)


async def test_scores_of_another_version_of_the_reward_are_not_used(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await keep(file, Scored(1.5))

    assert await found(file, sample(0), version="2") == [None]
    assert "scores of another version of the reward are not used" in caplog.text
    assert await found(file, sample(0), version="1") == [None], "what can't be used is dropped"


def size_of(file: Path) -> int:
    return file.stat().st_size


def cut_off(file: Path, count: int) -> None:
    file.write_bytes(file.read_bytes()[:-count])


@pytest.mark.parametrize("cut", [1, 40])
async def test_a_line_that_was_cut_off_is_dropped_and_the_file_goes_on_after_the_one_before(
    file: Path, cut: int
) -> None:
    await keep(file, Scored(1.0), Scored(2.0))
    cut_off(file, cut)

    async with aclosing(Journal(file, reward_version="1")) as journal:
        await journal.keep(sample(2), Scored(3.0))

    assert await found(file, *(sample(row) for row in range(3))) == [Scored(1.0), None, Scored(3.0)]


def damage_second_line(file: Path, change: Callable[[bytes], bytes]) -> None:
    lines = file.read_bytes().splitlines()
    lines[1] = change(lines[1])
    file.write_bytes(b"".join(line + b"\n" for line in lines))


@pytest.mark.parametrize(
    "change",
    [lambda line: line.replace(b"2.0", b"2.5"), lambda line: bytes(len(line)), lambda line: b"[1]"],
    ids=["another digit", "zeros", "no JSON object"],
)
async def test_a_damaged_line_is_named_and_never_believed(
    file: Path, change: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    await keep(file, Scored(1.0), Scored(2.0), Scored(3.0))
    damage_second_line(file, change)

    assert await found(file, *(sample(row) for row in range(3))) == [Scored(1.0), None, Scored(3.0)]

    assert [f"{file}:2" in record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [True]


async def test_entries_that_no_checkpoint_leads_back_to_are_dropped_from_the_file(file: Path) -> None:
    async with aclosing(Journal(file, reward_version="1")) as journal:
        for step in range(1, 5):
            await journal.keep(sample(0, step=step), Scored(float(step)))
        await journal.forget(before=3)
        await journal.keep(sample(0, step=5), Scored(5.0))

    assert [line["step"] for line in lines_of(file)] == [3, 4, 5]
    assert await found(file, *(sample(0, step=step) for step in range(1, 6))) == [
        None,
        None,
        Scored(3.0),
        Scored(4.0),
        Scored(5.0),
    ]


async def test_answers_kept_while_the_file_is_rewritten_are_in_it(file: Path) -> None:
    async with aclosing(Journal(file, reward_version="1")) as journal:
        await asyncio.gather(
            *(journal.keep(sample(row), Scored(float(row))) for row in range(10)),
            journal.forget(before=1),
            *(journal.keep(sample(row), Scored(float(row))) for row in range(10, 20)),
            journal.forget(before=1),
        )

    assert await found(file, *(sample(row) for row in range(20))) == [Scored(float(row)) for row in range(20)]


async def test_how_many_answers_are_reused_is_told(file: Path) -> None:
    await keep(file, Scored(1.0), Scored(2.0))
    told: list[None] = []

    async with aclosing(Journal(file, reward_version="1", on_found=lambda: told.append(None))) as journal:
        for row in range(3):
            journal.find(sample(row))

    assert len(told) == 2


async def test_a_full_disk_is_told_to_whoever_waits_and_earlier_answers_stay(file: Path) -> None:
    await keep(file, Scored(1.0))

    with files_of_at_most(size_of(file) + 10), pytest.raises(StorageError, match=str(file)):
        async with aclosing(Journal(file, reward_version="1")) as journal:
            await journal.keep(sample(1), Scored(2.0))

    assert await found(file, sample(0), sample(1)) == [Scored(1.0), None]
