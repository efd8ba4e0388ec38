"""Every command of the README and the docs that starts one of our processes has settings that the process accepts."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# A command line in a console block, with its continuation lines.
COMMAND = re.compile(r"^(?:\$ )?(python -m (?:policy_server|reward_server|trainer) (?:.*\\\n)*.*)$", re.MULTILINE)


def documented() -> Iterator[str]:
    for page in PAGES:
        for command in COMMAND.findall(page.read_text()):
            yield re.sub(r"\s*\\\n\s*", " ", command)


def test_the_readme_starts_all_three_processes() -> None:
    started = {shlex.split(command)[2] for command in COMMAND.findall(PAGES[0].read_text())}
    assert started == {"policy_server", "reward_server", "trainer"}


@pytest.mark.parametrize("command", sorted(set(documented())))
def test_a_documented_command_has_settings_that_are_accepted(command: str) -> None:
    words = [word for word in shlex.split(command, comments=True) if word != "&"]
    checked = subprocess.run(
        [sys.executable, *words[1:], "--print-config"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert checked.returncode == 0, checked.stderr
