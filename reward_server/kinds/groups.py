"""Groups of completions of one prompt, for rewards that compare them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from reward_server.results import Failed, Outcome


def fail_whole_groups(group_ids: Sequence[str], outcomes: Sequence[Outcome | None]) -> list[Outcome | None]:
    """`outcomes`, with each Failed spread over its group: what is left of a group cannot be compared.

    group_ids: those of the samples, in the order of `outcomes`; None = not judged yet.
    """
    failed = {
        group: replace(outcome, message=f"another sample of the group failed: {outcome.message}")
        for group, outcome in zip(group_ids, outcomes, strict=True)
        if isinstance(outcome, Failed)
    }
    return [
        outcome if isinstance(outcome, Failed) else failed.get(group, outcome)
        for group, outcome in zip(group_ids, outcomes, strict=True)
    ]
