"""How the tables came to be what they are, a step each; run at every start."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.util.exc import CommandError
from sqlalchemy import Connection


class NewerDatabaseError(Exception):
    """The database was brought up to date by a later release than this."""


def upgrade(connection: Connection) -> None:
    """Apply the steps that are missing, within the connection's transaction."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, "head")
    except CommandError as error:
        raise NewerDatabaseError(f"this release does not know the database's tables: {error}") from error
