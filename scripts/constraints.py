"""Resolve constraints.txt again: keep what is pinned, add what pyproject.toml newly needs."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"


def main() -> int:
    """Run uv's resolver for every supported Python and platform; the file's own header is kept."""
    header = "".join(line for line in CONSTRAINTS.read_text().splitlines(keepends=True) if line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    uv = Path(sysconfig.get_path("scripts")) / "uv"
    command = [
        *(uv, "pip", "compile", "pyproject.toml", "-", "--all-extras", "--universal", "--quiet"),
        *("--python-version", project["project"]["requires-python"].removeprefix(">=")),
        *("--no-annotate", "--no-header", "--output-file", CONSTRAINTS),
    ]
    # The build backend is installed too, so it is pinned with the rest.
    build_requirements = "\n".join(project["build-system"]["requires"])
    status = subprocess.run(command, input=build_requirements, text=True, cwd=ROOT).returncode
    if status == 0:
        CONSTRAINTS.write_text(header + CONSTRAINTS.read_text())
    return status


if __name__ == "__main__":
    sys.exit(main())
