"""The file of known failures: what a server is known to get wrong, each line with its reason."""

from __future__ import annotations

from pathlib import Path


def read_known_failures(path: Path) -> dict[str, str]:
    """Reasons by case id; ValueError for an id that stands twice."""
    known: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        case_id, _, reason = (part.strip() for part in line.partition("#"))
        if not case_id:
            continue
        if case_id in known:
            raise ValueError(f"{path}, line {number}: {case_id} stands there twice")
        known[case_id] = reason
    return known
