"""The command, as people use it, up to serving what it made."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import grpc
import pytest

from reward_server.train_model.__main__ import main
from rlhf.reward.v1 import reward_pb2_grpc
from tests.reward_server.conftest import request, sample
from tests.reward_server.train_model.test_training import RATED
from tests.support.processes import ROOT, StartProcess

PAGE = (ROOT / "docs" / "rewards" / "model.md").read_text()
AGREEMENT = r"On (\d+) held-out texts: Pearson (\S+), Spearman (\S+), RMSE"


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "ratings.tsv"
    path.write_text("review\tstars\n" + "".join(f"{each.text}\t{each.rating}\n" for each in RATED))
    return path


def command(table: Path, output: Path, *flags: str) -> list[str]:
    columns = ["--text-column", "review", "--rating-column", "stars"]
    return ["--data", str(table), *columns, "--output", str(output), *flags]


def test_it_trains_reports_and_says_how_to_serve(table: Path, tmp_path: Path, start_process: StartProcess) -> None:
    made = subprocess.run(
        [sys.executable, "-m", "reward_server.train_model", *command(table, tmp_path / "model", "--epochs", "6")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert made.returncode == 0, made.stderr
    told = re.search(AGREEMENT, made.stdout)
    assert told is not None
    assert float(told[2]) > 0.8
    in_units, from_minus_1 = re.findall(r"python -m (reward_server .*)", made.stdout)
    assert in_units != from_minus_1
    server = start_process(*shlex.split(in_units))
    server.wait_serving("rlhf.reward.v1.RewardService")
    with grpc.insecure_channel(server.address) as channel:
        bad, good = (
            reward_pb2_grpc.RewardServiceStub(channel)
            .Score(request(sample("a", "The film is dreadful"), sample("b", "The film is splendid")), timeout=30)
            .results
        )
    assert -2 < bad.scored.reward < 3 < good.scored.reward < 8


def test_a_mistake_is_explained_in_a_line(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", str(table), "--output", str(tmp_path / "model")]) == 78
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.endswith("row 1 has no column 'text'; it has 'review', 'stars'")


@pytest.mark.parametrize("flags", [("--epochs", "0"), ("--held-out", "1"), ("--learning-rate", "-1"), ("--epoch", "2")])
def test_flags_that_make_no_sense_are_refused(
    flags: tuple[str, str], table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(command(table, tmp_path / "model", *flags))
    assert ended.value.code == 2
    assert flags[0] in capsys.readouterr().err


@pytest.mark.slow
def test_the_page_tells_how_well_it_agrees_with_people_on_film_reviews(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (ROOT / ".cache").mkdir(exist_ok=True)
    (tmp_path / ".cache").symlink_to(ROOT / ".cache")
    monkeypatch.chdir(tmp_path)
    (script,) = re.findall(r"<<'END'\n(.*?)\nEND\n", PAGE, re.DOTALL)
    exec(script, {})
    (command,) = re.findall(r"^\$ python -m reward_server.train_model (.*)$", PAGE, re.MULTILINE)
    assert main(shlex.split(command)) == 0
    printed, told = (re.search(AGREEMENT, text) for text in (capsys.readouterr().out, PAGE))
    assert printed is not None
    assert told is not None
    assert printed[1] == told[1]
    # Another processor rounds otherwise, and a training goes its own way from there.
    assert [float(printed[2]), float(printed[3])] == pytest.approx([float(told[2]), float(told[3])], abs=0.03)
