"""The human kind: people rate completions on a web page, out of a queue that no crash empties."""

import logging

# At each start alembic tells of every plug-in that it has.
logging.getLogger("alembic").setLevel(logging.WARNING)
