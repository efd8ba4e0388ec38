"""What the queue of ratings hands out. All times are POSIX seconds."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Ticket:
    """A sample that a rater has leased: nobody else is shown it in this rater's place until `lease_until`.

    messages_json: the conversation as a JSON list of {"role", "content", …}, "[]" when the prompt is not a chat.
    ratings: how many people have rated it already, of the `wanted` that it needs.
    """

    id: int
    run_id: str
    sample_id: str
    prompt: str
    completion: str
    messages_json: str
    created_at: float
    ratings: int
    wanted: int
    lease_until: float


class TicketState(enum.StrEnum):
    """What became of a ticket; all but OPEN end it. The names are stored."""

    OPEN = "open"
    SCORED = "scored"
    ABSTAINED = "abstained"
    FAILED = "failed"


class Rated(enum.Enum):
    """What became of a rating or skip that was posted."""

    STORED = enum.auto()
    """It is in the database, now or since an earlier post of the same."""
    LEASE_LOST = enum.auto()
    """The ticket is somebody else's by now, or closed, or this rater has judged it otherwise: nothing was stored."""


@dataclass(frozen=True)
class Rater:
    """Somebody who rates. `credential` changes with the token: a session that holds another one has ended."""

    id: int
    name: str
    is_admin: bool
    credential: str


@dataclass(frozen=True)
class Pace:
    """How quickly a rater rates; skips count nowhere. Today began at midnight UTC; `per_hour` is the last hour's."""

    rated_today: int
    rated_total: int
    per_hour: float


@dataclass(frozen=True)
class RaterPace:
    """A rater's pace and skips, for administrators."""

    name: str
    pace: Pace
    skipped: int


@dataclass(frozen=True)
class Queue:
    """The open tickets: `waiting`, or `leased` by somebody just now. oldest_age_seconds: None when there is none."""

    waiting: int
    leased: int
    oldest_age_seconds: float | None


@dataclass(frozen=True)
class Overview:
    """The queue, the number of tickets that are `done`, and who works at it.

    agreement: Krippendorff's alpha, None while no two people have rated the same ticket or all ratings are equal.
    """

    queue: Queue
    done: int
    raters: Sequence[RaterPace]
    agreement: float | None


@dataclass(frozen=True)
class ExportRow:
    """One rating or skip, and what became of its ticket. value: None = skipped; rated_at: ISO 8601, UTC."""

    version: str
    run_id: str
    sample_id: str
    prompt: str
    completion: str
    messages_json: str
    rater: str
    value: float | None
    rated_at: str
    outcome: str
    reward: float | None
    reason: str
