"""docs/failures.md names tests that exist, and says which are slow."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NAMED = re.findall(r"^- (tests/[\w/]+\.py)::(\w+)( \(slow\))?$", (ROOT / "docs" / "failures.md").read_text(), re.M)


def test_no_section_is_without_a_test() -> None:
    sections = re.split(r"^## ", (ROOT / "docs" / "failures.md").read_text(), flags=re.M)[1:]
    assert len(sections) > 10
    assert not [section.splitlines()[0] for section in sections if "\n- tests/" not in section]


@pytest.mark.parametrize(("file", "name", "slow"), NAMED)
def test_a_test_that_it_names_exists_and_is_slow_if_it_says_so(file: str, name: str, slow: str) -> None:
    tree = ast.parse((ROOT / file).read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    (function,) = [function for function in functions if function.name == name]
    marks = [ast.unparse(decorator) for decorator in function.decorator_list]
    assert ("pytest.mark.slow" in marks) == bool(slow)
