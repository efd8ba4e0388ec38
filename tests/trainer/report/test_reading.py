from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.trainer.report.folders import evaluation, run_of, sample, step, write_run
from trainer.report.reading import NoRunError, Run, best_step, number, points, read_run, with_samples

WANTED = {"step": {1}, "evaluation": {0}}


def read(folder: Path) -> Run:
    return with_samples(read_run(folder, name="run"), folder, WANTED)


def test_a_run_is_read_from_its_folder(tmp_path: Path) -> None:
    dropped = {"step": 1, "outcome": "dropped", "reason": "failed", "code": "NOT_FINITE", "said": "nan"}
    write_run(
        tmp_path,
        [evaluation(0, reward_mean=0.25), step(1, reward_mean=None), step(2, reward_mean=0.5)],
        samples=[sample("evaluation", 0, 0, "a"), sample("step", 1, 0, "b"), sample("step", 2, 0, "not wanted")],
        accounting=[
            {"step": 1, "outcome": "trained"},
            dropped,
            dropped,
            {**dropped, "reason": "abstained", "code": ""},
        ],
        settings="steps: 9\n",
        run_id="mine",
    )
    for number_of_step, version in ((9, "old"), (10, "new")):
        checkpoint = tmp_path / "checkpoints" / f"step-{number_of_step:06d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "trainer_state.json").write_text(json.dumps({"pins": {"reward_version": version}}))

    run = read(tmp_path)

    assert (run.run_id, run.incarnation, run.number("steps"), run.reward_version) == ("mine", 1, 9.0, "new")
    assert points(run.steps, "reward_mean") == [(1, None), (2, 0.5)]
    assert points(run.evaluations, "reward_mean") == [(0, 0.25)]
    assert [(each.kind, each.completion) for each in run.samples] == [("evaluation", "a"), ("step", "b")]
    assert [(drop.reason, drop.code, drop.count) for drop in run.drops] == [
        ("failed", "NOT_FINITE", 2),
        ("abstained", "", 1),
    ]
    assert run.unreadable == {}


def test_a_last_line_that_is_being_written_is_left_out_without_a_complaint(tmp_path: Path) -> None:
    write_run(tmp_path, [step(1)])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "step": 2, "rew')

    run = read(tmp_path)

    assert [line["step"] for line in run.steps] == [1]
    assert run.unreadable == {}


@given(st.lists(st.binary(max_size=40), max_size=5), st.binary(max_size=20))
@example([b"[" * 100_000], b"")
@example([b'{"kind": "step", "step": 1e999}', b'{"kind": "step", "step": true}', b'{"kind": [], "step": 1}'], b"")
@example([b'{"kind": "step", "step": 3, "reward_mean": NaN}', b"null", b'{"step": ' + b"9" * 5000 + b"}"], b"{")
def test_whatever_stands_between_good_lines_they_are_read_and_the_rest_is_counted(
    garbage: list[bytes], torn: bytes
) -> None:
    with TemporaryDirectory() as name:
        folder = write_run(Path(name), [step(1, reward_mean=1.0)])
        good = [json.dumps(line).encode() for line in (step(4, reward_mean=4.0), sample("step", 1, 0, "text"))]
        # One line of garbage each, and none of them by chance a good one.
        lines = [line.replace(b"\n", b" ") for line in garbage]
        torn = torn.replace(b"\n", b" ")
        for file, line in zip(("metrics", "samples"), good, strict=True):
            (folder / f"{file}.jsonl").write_bytes(b"\n".join([*lines, line, torn]))

        run = read(folder)

    assert points(run.steps, "reward_mean") == [(4, 4.0)]
    assert [each.completion for each in run.samples] == ["text"]
    bad = len([line for line in lines if line.strip()])
    assert [run.unreadable.get(f"{file}.jsonl", 0) for file in ("metrics", "samples")] == [bad, bad]


@pytest.mark.parametrize("content", ["", "{", "[1]", "a: [", "\x00", "null"])
def test_small_files_that_are_just_being_replaced_are_taken_as_absent(tmp_path: Path, content: str) -> None:
    write_run(tmp_path, [step(1)])
    for name in ("run.json", "settings.yaml"):
        (tmp_path / name).write_text(content)

    run = read(tmp_path)

    assert (run.run_id, run.incarnation, dict(run.settings)) == ("unknown", None, {})


def test_a_folder_without_numbers_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(NoRunError, match=r"there is no metrics\.jsonl"):
        read_run(tmp_path, name="run")


@pytest.mark.parametrize("value", [None, True, "1", [1.0], float("inf"), 10**400])
def test_only_finite_numbers_are_numbers(value: object) -> None:
    assert number({"x": value}, "x") is None


def test_a_resume_is_where_the_incarnation_changes() -> None:
    run = run_of([step(1, incarnation=1), step(2, incarnation=1), step(3, incarnation=2), step(4, incarnation=4)])
    assert run.resumed_after() == [2, 3]


def test_the_best_evaluation_is_the_first_of_equals() -> None:
    rewards = (0.1, None, 0.7, 0.7, 0.2)
    assert best_step([evaluation(at, reward_mean=reward) for at, reward in enumerate(rewards)]) == 2
    assert best_step([evaluation(0, reward_mean=None)]) is None
