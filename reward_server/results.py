"""What a reward function may answer, and what becomes of a sample."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Reward:
    """One sample's reward with detail; a reward function may return it where a plain number would do.

    value: the scalar reward, finite, higher is better. components: named numbers for reports; they need not add up
    to `value`. token_rewards: empty, or one number per completion token, which the trainer ADDS to `value` (the
    function must take `completion_ids` to know how many tokens there are).
    """

    value: float
    components: Mapping[str, float] = field(default_factory=dict)
    token_rewards: Sequence[float] = ()


class RetryLater(Exception):  # noqa: N818 - an instruction to the caller, not a defect
    """Raised by a reward function that cannot judge now but will later: the samples of the call become PENDING.

    seconds: how long the client should wait before it asks again; finite and above 0.
    """

    def __init__(self, seconds: float, reason: str = "") -> None:
        if not (math.isfinite(seconds) and seconds > 0):
            raise ValueError(f"RetryLater needs a finite number of seconds above 0, not {seconds!r}")
        super().__init__(reason or f"retry after {seconds:g} s")
        self.seconds = seconds


class FailureCode(enum.StrEnum):
    """Why a sample failed; the names go over the wire and into metrics, so they never change."""

    MISSING_METADATA = "MISSING_METADATA"
    INVALID_METADATA = "INVALID_METADATA"
    MISSING_TOKEN_IDS = "MISSING_TOKEN_IDS"
    UNKNOWN_CONTENT = "UNKNOWN_CONTENT"
    FUNCTION_RAISED = "FUNCTION_RAISED"
    WRONG_RESULT = "WRONG_RESULT"
    NOT_FINITE = "NOT_FINITE"
    SAMPLE_ID_CLASH = "SAMPLE_ID_CLASH"
    EXPIRED = "EXPIRED"
    SAMPLE_TOO_LARGE = "SAMPLE_TOO_LARGE"
    REMOTE_REFUSED = "REMOTE_REFUSED"
    JUDGE_REFUSED = "JUDGE_REFUSED"
    JUDGE_UNREADABLE = "JUDGE_UNREADABLE"
    EMPTY_TEXT = "EMPTY_TEXT"
    TEXT_TOO_LONG = "TEXT_TOO_LONG"
    CHAT_TEMPLATE = "CHAT_TEMPLATE"


@dataclass(frozen=True)
class Scored:
    """Judged. Everything in it is finite."""

    reward: float
    components: Mapping[str, float] = field(default_factory=dict)
    token_rewards: Sequence[float] = ()


@dataclass(frozen=True)
class Abstained:
    """Deliberately not judged."""

    reason: str


@dataclass(frozen=True)
class Pending:
    """Not yet; worth asking again after `retry_after` seconds."""

    retry_after: float


@dataclass(frozen=True)
class Failed:
    """Can never be judged. code: one of FailureCode, or another server's own, UPPER_SNAKE_CASE."""

    code: str
    message: str


Outcome = Scored | Abstained | Pending | Failed
