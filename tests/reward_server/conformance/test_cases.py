"""The cases as data: ids, sentences, and a server for each that it catches."""

from __future__ import annotations

import ast
import re
import sys

import pytest

from reward_server.conformance.__main__ import main
from reward_server.conformance.case import CASES, Case
from reward_server.conformance.runner import ExitCode
from tests.reward_server.conformance.broken import BROKEN
from tests.support.processes import ROOT

PROTO = " ".join(
    " ".join(
        line.strip().removeprefix("//")
        for line in (ROOT / "protos/rlhf/reward/v1/reward.proto").read_text().splitlines()
    ).split()
)
PAGE = (ROOT / "docs" / "conformance.md").read_text()
ALLOWED_IMPORTS = {*sys.stdlib_module_names, "google", "grpc", "grpc_health", "grpc_reflection", "rlhf"}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_sentence_of_a_case_stands_in_the_contract(case: Case) -> None:
    assert case.sentence in PROTO


def test_an_id_is_a_theme_and_a_name() -> None:
    assert not [case_id for case_id in CASES if not re.fullmatch(r"[a-z]+/[a-z-]+", case_id)]


def test_what_explains_a_case_is_a_case() -> None:
    assert not [other for case in CASES.values() for other in case.explained_by if other not in CASES]


def test_every_case_catches_a_server() -> None:
    assert {case_id for case_id, _ in BROKEN} == set(CASES)


def test_the_kit_uses_nothing_of_the_server_beside_it() -> None:
    foreign = [
        f"{file.name}: {name}"
        for file in (ROOT / "reward_server" / "conformance").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        if name.partition(".")[0] not in ALLOWED_IMPORTS and not name.startswith("reward_server.conformance")
    ]
    assert foreign == []


def test_the_page_has_a_row_for_every_case() -> None:
    rows = re.findall(r"^\| `([a-z-]+/[a-z-]+)` \| (\w+) \| (.*) \|$", PAGE, re.MULTILINE)
    assert rows == [(case.id, case.level.value, case.summary) for case in CASES.values()]


def test_the_page_has_every_exit_code_and_no_flag_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    told = capsys.readouterr().out
    assert re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE) == [str(int(code)) for code in ExitCode]
    assert re.findall(r"^  (\d+) ", told, re.MULTILINE) == [str(int(code)) for code in ExitCode]
    assert all(f"--{flag}" in told for flag in re.findall(r"--([a-z][a-z-]+)", PAGE))
