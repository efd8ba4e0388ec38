"""The golden vectors, and the one example that needs no build."""

from __future__ import annotations

import subprocess
import sys

from tests.reward_server.examples.make_golden import VECTORS, render, vectors
from tests.support.processes import ROOT


def test_the_committed_vectors_are_those_that_the_script_makes() -> None:
    assert VECTORS.read_text(encoding="ascii") == render(), "python -m tests.reward_server.examples.make_golden"


def test_there_are_200_of_them_each_with_a_name_and_a_content_of_its_own() -> None:
    names = {vector["id"] for vector in vectors()}
    contents = {repr({**vector, "id": ""}) for vector in vectors()}
    assert len(vectors()) == len(names) == len(contents) == 200


def test_the_python_example_passes_its_own_tests_with_every_vector_to_the_last_bit() -> None:
    tests = subprocess.run(
        # pytest-asyncio, where it is installed, warns of a setting that an example without it has no use for.
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:asyncio"],
        cwd=ROOT / "reward_server" / "examples" / "python",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert tests.returncode == 0, tests.stdout
    assert not tests.stderr
