"""The cases, in the order in which they run: each module has those of one theme."""

from reward_server.conformance.cases import (  # isort: skip  # noqa: F401 - importing a module adds its cases
    info,
    health,
    score,
    outcomes,
    repeats,
    content,
    metadata,
    requests,
    errors,
    groups,
    limits,
    deadlines,
    closing,
)
