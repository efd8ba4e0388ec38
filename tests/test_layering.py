"""The arrows between the packages, read from their imports."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

MAY_IMPORT = {
    "rlhf": {"rlhf"},
    "policy_server": {"rlhf", "policy_server"},
    "reward_server": {"rlhf", "reward_server"},
    "trainer": {"rlhf", "trainer"},
}

LAYERS = {
    "policy_server": (
        {"engine", "settings"},
        {"metrics", "readiness", "validation"},
        {"prompts", "manifest"},
        {"service", "staging"},
        {"directory", "updates"},
        {"weights_service"},
        {"assembly"},
        {"__init__", "__main__", "client"},
    ),
    "reward_server": (
        {"results", "workers", "normalisation"},
        {"builtins", "memory", "metrics"},
        {"kinds"},
        {"human", "scheduler", "settings", "validation", "wire"},
        {"composite", "service"},
        {"assembly"},
        {"__init__", "__main__", "conformance", "train_model"},
    ),
    "trainer": (
        {"adapters", "ppo", "versions", "tokenizers", "metrics"},
        {"responses", "settings"},
        {"model"},
        {"learning", "clients"},
        {"run", "quickstart", "report"},
        {"__init__", "__main__"},
    ),
}
"""The parts of each package, from mathematics or plain data up to the command line."""


MATHEMATICS_MAY_IMPORT = {"torch", "numpy", "pydantic"}


def imported(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute here"
            yield node.module or ""


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_imports_of_ours_only_what_lies_below_it(package: str) -> None:
    wrong = [
        f"{file.relative_to(ROOT)}: {name}"
        for file in sorted((ROOT / package).rglob("*.py"))
        for name in imported(file)
        if name.partition(".")[0] in MAY_IMPORT and name.partition(".")[0] not in MAY_IMPORT[package]
    ]
    assert not wrong


@pytest.mark.parametrize("package", ["demo", "tests"])
def test_nothing_that_is_installed_imports_what_is_not(package: str) -> None:
    wrong = [
        f"{file.relative_to(ROOT)}: {name}"
        for installed in MAY_IMPORT
        for file in sorted((ROOT / installed).rglob("*.py"))
        for name in imported(file)
        if name.partition(".")[0] == package
    ]
    assert not wrong


@pytest.mark.parametrize("package", LAYERS)
def test_a_part_of_a_package_imports_only_parts_below_it(package: str) -> None:
    place = {part: number for number, parts in enumerate(LAYERS[package]) for part in parts}
    parts = {
        path.stem for path in (ROOT / package).iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert parts == place.keys(), "every part has its place among the layers"
    wrong = [
        f"{file.relative_to(ROOT)}: {name}"
        for file in sorted((ROOT / package).rglob("*.py"))
        for name in imported(file)
        if name.startswith(f"{package}.")
        for part, other in [(file.relative_to(ROOT / package).parts[0].removesuffix(".py"), name.split(".")[1])]
        if part != other and place[other] >= place[part]
    ]
    assert not wrong


def test_the_mathematics_imports_only_tensors_and_the_standard_library() -> None:
    allowed = MATHEMATICS_MAY_IMPORT | sys.stdlib_module_names
    wrong = [
        f"{file.name}: {name}"
        for file in sorted((ROOT / "trainer" / "ppo").glob("*.py"))
        for name in imported(file)
        if name.partition(".")[0] not in allowed and not name.startswith("trainer.ppo")
    ]
    assert not wrong


def test_every_file_that_the_architecture_page_names_exists() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.(?:py|md|proto))", page))
    assert len(named) > 15
    assert not [name for name in sorted(named) if not (ROOT / name).exists()]
