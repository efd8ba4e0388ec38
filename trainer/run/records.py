"""The run's append-only files: numbers, samples, and what became of every prompt."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.clients.rewards import Abstained, Failed, Scored
from trainer.run.prompts import Draw, DropReason
from trainer.run.rollouts import Rollout
from trainer.run.runfolder import JsonLines


class RunRecords:
    """metrics.jsonl, samples.jsonl and accounting.jsonl; a resumed run cuts them back to its checkpoint first."""

    def __init__(self, folder: Path, offsets: Mapping[str, int]) -> None:
        self.metrics = JsonLines(folder / "metrics.jsonl", keep_bytes=offsets.get("metrics", 0))
        self.samples = JsonLines(folder / "samples.jsonl", keep_bytes=offsets.get("samples", 0))
        self.accounting = JsonLines(folder / "accounting.jsonl", keep_bytes=offsets.get("accounting", 0))

    def sync(self) -> dict[str, int]:
        """Make all three durable and return their lengths, for the checkpoint."""
        return {
            "metrics": self.metrics.sync(),
            "samples": self.samples.sync(),
            "accounting": self.accounting.sync(),
        }

    def close(self) -> None:
        """Close all three."""
        for file in (self.metrics, self.samples, self.accounting):
            file.close()


def drop_reason(rollout: Rollout) -> DropReason | None:
    """Why a rollout can't be trained on; None = it can."""
    match rollout.outcome:
        case Scored():
            return None
        case Abstained():
            return DropReason.ABSTAINED
        case Failed():
            return DropReason.FAILED
        case None:
            return DropReason.EMPTY_COMPLETION


def accounting_lines(step: int, draws: Iterable[Draw], rollouts: Iterable[Rollout | None]) -> list[dict[str, Any]]:
    """One line per prompt drawn for `step`: trained, or dropped with the reason and what the reward server said.

    `versions` are those of the weights that sampled its tokens, in their order.

    `rollouts` are those of the usable draws, in order; None is a straggler.
    """
    remaining = iter(rollouts)
    lines: list[dict[str, Any]] = []
    for draw in draws:
        line: dict[str, Any] = {
            "step": step,
            "epoch": draw.at.epoch,
            "position": draw.at.position,
            "row": draw.prompt.record.row,
        }
        reason, rollout, said = draw.dropped, None, None
        if reason is None:
            rollout = next(remaining)
            if rollout is None:
                reason = DropReason.STRAGGLER
            else:
                reason, said = drop_reason(rollout), _what_was_said(rollout)
        line["outcome"] = "trained" if reason is None else "dropped"
        if reason is not None:
            line["reason"] = reason.value
        if rollout is not None and rollout.generation.versions:
            line["versions"] = [weights.version for weights in rollout.generation.versions]
        if rollout is not None and isinstance(rollout.outcome, Failed):
            line["code"] = rollout.outcome.code
        if said:
            line["said"] = said
        lines.append(line)
    return lines


def _what_was_said(rollout: Rollout) -> str | None:
    match rollout.outcome:
        case Abstained(reason=reason):
            return reason
        case Failed(message=message):
            return message
        case _:
            return None


def scalars(statistics: Mapping[str, Any]) -> dict[str, float | None]:
    """The single numbers among a learner's statistics; what is undefined (NaN, infinite) becomes None."""
    result: dict[str, float | None] = {}
    for name, value in statistics.items():
        if isinstance(value, Tensor):
            if value.numel() != 1:
                continue
            value = value.item()
        if isinstance(value, int | float):
            result[name] = float(value) if math.isfinite(value) else None
    return result
