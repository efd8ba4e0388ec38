"""Servers that break one sentence each, with the id of the case that has to say so."""

from tests.reward_server.conformance.broken import (  # noqa: F401 - importing a module adds its servers
    content,
    groups,
    info,
    limits,
    metadata,
    outcomes,
    repeats,
    requests,
    scores,
)
from tests.reward_server.conformance.broken.marking import BROKEN

__all__ = ["BROKEN"]
