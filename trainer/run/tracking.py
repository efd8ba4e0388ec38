"""Optional trackers beside metrics.jsonl: TensorBoard and Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from trainer.settings import TrackerName


class Tracker(Protocol):
    """Takes the numbers of a step or an evaluation."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Finite numbers only, by name."""
        ...

    def close(self) -> None:
        """Send what is left."""
        ...


class TensorBoardTracker:
    """Event files under <run>/tensorboard; points after the step that a resumed run continues from are purged.

    `resumed_step` None: the run begins, and whatever an earlier start left before its first checkpoint is purged.
    """

    def __init__(self, folder: Path, *, resumed_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=0 if resumed_step is None else resumed_step + 1)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """One scalar each."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class WandbTracker:
    """A Weights & Biases run of the same id, continued when the run is resumed; WANDB_* variables apply.

    What is logged there stays: steps that a resumed run makes again are there twice.
    """

    def __init__(self, *, run_id: str, settings: Mapping[str, Any], folder: Path) -> None:
        import wandb

        self._run = wandb.init(id=run_id, resume="allow", config=dict(settings), dir=str(folder))
        # Its own count of log calls would set evaluations and steps one after the other.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """One point."""
        self._run.log({**numbers, "step": step})

    def close(self) -> None:
        """Finish the run there."""
        self._run.finish()


def open_trackers(
    names: Sequence[TrackerName], *, run_id: str, folder: Path, settings: Mapping[str, Any], resumed_step: int | None
) -> list[Tracker]:
    """Open each; `resumed_step` is the checkpoint's that the run goes on from, None when it begins.

    Raises ImportError naming the extra to install when a library is missing.
    """
    trackers: list[Tracker] = []
    for name in names:
        try:
            if name is TrackerName.TENSORBOARD:
                trackers.append(TensorBoardTracker(folder / "tensorboard", resumed_step=resumed_step))
            else:
                trackers.append(WandbTracker(run_id=run_id, settings=settings, folder=folder))
        except ImportError as error:
            raise ImportError(f"--track {name.value}: pip install 'rlhf-services[{name.value}]'") from error
    return trackers
