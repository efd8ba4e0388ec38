"""Run by alembic for every command, on the connection that `upgrade` gives it."""

from __future__ import annotations

from alembic import context

from reward_server.human.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, transactional_ddl=True)
with context.begin_transaction():
    context.run_migrations()
