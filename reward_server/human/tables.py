"""The tables. What changes here needs a migration (migrations/versions/), and a test compares the two."""

from __future__ import annotations

from typing import Any, TypeAlias

from sqlalchemy import (
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Row,
    Table,
    Text,
    UniqueConstraint,
)
from sqlalchemy.engine import Dialect
from sqlalchemy.types import TypeDecorator

AnyRow: TypeAlias = Row[*tuple[Any, ...]]

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
    }
)


class AnyText(TypeDecorator[str]):
    """Text of others. PostgreSQL cannot store U+0000, so its picture (U+2400) stands for it, in either database."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> Any:
        """As it is stored."""
        return stored(value) if isinstance(value, str) else value


def stored(text: str) -> str:
    """What comes back of a text that was stored."""
    return text.replace("\0", "\u2400")


tickets = Table(
    "tickets",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("version", Text, nullable=False),
    Column("run_id", AnyText, nullable=False),
    Column("sample_id", AnyText, nullable=False),
    Column("fingerprint", LargeBinary, nullable=False),
    Column("prompt", AnyText, nullable=False),
    Column("completion", AnyText, nullable=False),
    Column("messages_json", Text, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("state", Text, nullable=False),
    Column("reward", Double),
    Column("components_json", Text, nullable=False),
    Column("failure_code", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("closed_at", Double),
    Column("delivered_at", Double),
    UniqueConstraint("version", "run_id", "sample_id"),
    Index("ix_tickets_queue", "version", "state", "created_at", "id"),
)
"""A sample under one version of the rules. `delivered_at`: when its outcome was first answered to a trainer."""

raters = Table(
    "raters",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", AnyText, nullable=False, unique=True),
    Column("token_digest", LargeBinary, unique=True),
    Column("is_admin", Boolean, nullable=False),
)
"""People. Without a token they were removed: their ratings stay."""

judgements = Table(
    "judgements",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("ticket_id", ForeignKey(tickets.c.id), nullable=False),
    Column("rater_id", ForeignKey(raters.c.id), nullable=False),
    Column("value", Double),
    Column("at", Double, nullable=False),
    UniqueConstraint("ticket_id", "rater_id"),
    Index("ix_judgements_rater", "rater_id", "at"),
    sqlite_autoincrement=True,
)
"""Ratings, and skips, which have no value. Their ids grow with time: the largest is a rater's last."""

leases = Table(
    "leases",
    metadata,
    Column("rater_id", ForeignKey(raters.c.id), primary_key=True, autoincrement=False),
    Column("ticket_id", ForeignKey(tickets.c.id), nullable=False),
    Column("until", Double, nullable=False),
    Index("ix_leases_ticket_id", "ticket_id"),
)
"""Who was shown which ticket and may judge it. A ticket has no more leases and ratings together than it needs."""

settings = Table(
    "settings",
    metadata,
    Column("key", Text, primary_key=True),
    Column("value", Text, nullable=False),
)
"""What all replicas share."""
