from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trainer.report.folders import evaluation, sample, step, write_run
from trainer.report.__main__ import main
from trainer.report.page import write_page


def told(page: Path) -> str:
    """The text of a page's body on one line, marks taken out."""
    return " ".join(re.sub(r"<[^>]+>", " ", page.read_text().partition("<body>")[2]).split())


def test_the_command_writes_one_page_and_prints_its_name(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "first", [step(1, reward_mean=0.5)])
    command = [sys.executable, "-m", "trainer.report", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (0, f"{folder / 'report.html'}\n"), result.stderr
    assert (folder / "report.html").read_text().startswith("<!doctype html>")
    assert not list(folder.glob(".*"))


def test_two_runs_and_a_name_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (write_run(tmp_path / name, [step(1, reward_mean=0.5)]) for name in ("first", "second"))
    assert main([str(first), str(second)]) == 0
    assert main([str(first), str(second), "--output", str(tmp_path / "both.html")]) == 0
    assert capsys.readouterr().out.splitlines() == [
        str(first / "compared-with-second.html"),
        str(tmp_path / "both.html"),
    ]


def test_a_folder_without_a_run_and_a_place_that_cannot_be_written_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path)]) == 78
    assert f"{tmp_path}: there is no metrics.jsonl" in capsys.readouterr().err
    folder = write_run(tmp_path / "run", [step(1)])
    assert main([str(folder), "--output", str(tmp_path / "none" / "page.html")]) == 1
    assert "the page can't be written" in capsys.readouterr().err


def test_a_run_that_has_not_done_a_step_has_a_page(tmp_path: Path) -> None:
    write_page([write_run(tmp_path / "new", [])], tmp_path / "page.html")
    assert "no step is done yet" in told(tmp_path / "page.html")


def test_lines_that_are_left_out_are_counted_on_the_page(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [step(1)])
    with (folder / "samples.jsonl").open("a") as file:
        file.write("garbled\n")
    write_page([folder], tmp_path / "page.html")
    assert "1 in samples.jsonl" in told(tmp_path / "page.html")


def test_settings_that_are_not_the_default_are_shown_and_of_two_runs_those_that_differ(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", [step(1)], settings="steps: 7\nlearning_rate: 1.41e-05\nhorizon: 77.0\n")
    second = write_run(tmp_path / "b", [step(1)], settings="steps: 8\nlearning_rate: 1.41e-05\nhorizon: 77.0\n")
    write_page([first], tmp_path / "page.html")
    write_page([first, second], tmp_path / "both.html")

    alone, both = (told(tmp_path / name).partition("All settings")[0] for name in ("page.html", "both.html"))

    assert re.search(r"horizon [^\]]*\] 10000 77 ", alone)
    assert re.search(r"steps [^\]]*\] 100 7 ", alone)
    assert "learning_rate" not in alone
    assert re.search(r"steps [^\]]*\] 7 8 ", both)
    assert "horizon" not in both.rpartition("In which the runs differ")[2]


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / place / "run", [step(1, reward_mean=1.0)]) for place in ("a", "b")]
    write_page(folders, tmp_path / "page.html")
    assert all(f"{folder}: training" in told(tmp_path / "page.html") for folder in folders)


def test_the_same_steps_of_two_runs_are_shown_side_by_side(tmp_path: Path) -> None:
    folders = []
    for name, length in (("short", 40), ("long", 64)):
        evaluations = [evaluation(at, reward_mean=0.5) for at in range(length)]
        samples = [sample("evaluation", at, 0, f"{name} {at}") for at in range(length)]
        folders.append(write_run(tmp_path / name, evaluations, samples=samples))
    write_page(folders, tmp_path / "page.html")
    page = told(tmp_path / "page.html")
    shown = {name: {int(at) for at in re.findall(rf"{name} (\d+)\b", page)} for name in ("short", "long")}
    assert len(shown["short"]) >= 11
    assert shown["long"] - shown["short"] == {63}


def test_what_no_file_can_hold_is_replaced_rather_than_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [evaluation(0)], samples=[sample("evaluation", 0, 0, "a\ud800\x00b")])
    write_page([folder], tmp_path / "page.html")
    assert "a?\x00b" in (tmp_path / "page.html").read_text()
