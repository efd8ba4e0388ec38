"""The queue: tickets, raters, judgements, leases."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "tickets",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("version", sa.Text, nullable=False),
        sa.Column("run_id", sa.Text, nullable=False),
        sa.Column("sample_id", sa.Text, nullable=False),
        sa.Column("fingerprint", sa.LargeBinary, nullable=False),
        sa.Column("prompt", sa.Text, nullable=False),
        sa.Column("completion", sa.Text, nullable=False),
        sa.Column("messages_json", sa.Text, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("reward", sa.Double),
        sa.Column("components_json", sa.Text, nullable=False),
        sa.Column("failure_code", sa.Text, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("closed_at", sa.Double),
        sa.Column("delivered_at", sa.Double),
        sa.PrimaryKeyConstraint("id", name="pk_tickets"),
        sa.UniqueConstraint("version", "run_id", "sample_id", name="uq_tickets_version"),
    )
    op.create_index("ix_tickets_queue", "tickets", ["version", "state", "created_at", "id"])
    op.create_table(
        "raters",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("token_digest", sa.LargeBinary),
        sa.Column("is_admin", sa.Boolean, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_raters"),
        sa.UniqueConstraint("name", name="uq_raters_name"),
        sa.UniqueConstraint("token_digest", name="uq_raters_token_digest"),
    )
    op.create_table(
        "judgements",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("ticket_id", sa.Integer, nullable=False),
        sa.Column("rater_id", sa.Integer, nullable=False),
        sa.Column("value", sa.Double),
        sa.Column("at", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_judgements"),
        sa.ForeignKeyConstraint(["ticket_id"], ["tickets.id"], name="fk_judgements_ticket_id"),
        sa.ForeignKeyConstraint(["rater_id"], ["raters.id"], name="fk_judgements_rater_id"),
        sa.UniqueConstraint("ticket_id", "rater_id", name="uq_judgements_ticket_id"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_judgements_rater", "judgements", ["rater_id", "at"])
    op.create_table(
        "leases",
        sa.Column("rater_id", sa.Integer, nullable=False, autoincrement=False),
        sa.Column("ticket_id", sa.Integer, nullable=False),
        sa.Column("until", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("rater_id", name="pk_leases"),
        sa.ForeignKeyConstraint(["rater_id"], ["raters.id"], name="fk_leases_rater_id"),
        sa.ForeignKeyConstraint(["ticket_id"], ["tickets.id"], name="fk_leases_ticket_id"),
    )
    op.create_index("ix_leases_ticket_id", "leases", ["ticket_id"])
    op.create_table(
        "settings",
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("value", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("key", name="pk_settings"),
    )
