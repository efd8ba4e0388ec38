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
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

# A command line in a console block, with its continuation lines.
COMMAND = re.compile(r"^(?:\$ )?(python -m (?:policy_server|reward_server|trainer) (?:.*\\\n)*.*)$", re.MULTILINE)
# A file that a page shows, its name in the first line.
FILE = re.compile(r"^```\w+\n# ([\w.]+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def documented() -> Iterator[tuple[Path, str]]:
    for page in PAGES:
        for command in COMMAND.findall(page.read_text()):
            yield page, re.sub(r"\s*\\\n\s*", " ", command)


def test_the_readme_starts_all_three_processes() -> None:
    started = {shlex.split(command)[2] for command in COMMAND.findall(PAGES[0].read_text())}
    assert started == {"policy_server", "reward_server", "trainer"}


@pytest.mark.parametrize(
    ("page", "command"), [pytest.param(page, command, id=command) for page, command in sorted(set(documented()))]
)
def test_a_documented_command_has_settings_that_are_accepted(page: Path, command: str, tmp_path: Path) -> None:
    for name, content in FILE.findall(page.read_text()):
        (tmp_path / name).write_text(content)
    words = [word for word in shlex.split(command, comments=True) if word != "&"]
    checked = subprocess.run(
        [sys.executable, *words[1:], "--print-config"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert checked.returncode == 0, checked.stderr
