"""What became of each check of a start, and the table of them."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass


class Outcome(enum.Enum):
    """As the table shows it."""

    OK = "ok"
    FAILED = "FAILED"
    NOT_CHECKED = "not checked"


class NotCheckedError(Exception):
    """There is nothing to check, and nothing wrong with that; the message says why."""


@dataclass(frozen=True)
class Finding:
    """`detail` is what was found, or what is wrong with how to mend it, or why there was no check."""

    check: str
    outcome: Outcome
    detail: str


def table(findings: Sequence[Finding]) -> str:
    """One line for each finding: outcome, check, detail."""
    width = max(len(finding.check) for finding in findings)
    return "\n".join(f"{each.outcome.value:<11}  {each.check:<{width}}  {_line(each.detail)}" for each in findings)


def _line(text: str) -> str:
    return " ".join(text.split())
