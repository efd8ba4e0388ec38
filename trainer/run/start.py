"""Where a start of the run begins: afresh, at a checkpoint, or nowhere, because the run is finished."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trainer.run.checkpoints import CheckpointStore, RunState, exported_step, load_state
from trainer.run.runfolder import RunIdentity, next_identity
from trainer.settings import TrainerSettings


@dataclass(frozen=True)
class Start:
    """Who this start of the run is, and the checkpoint that it goes on from with what that says; None = a new run."""

    identity: RunIdentity
    checkpoint: Path | None = None
    stored: RunState | None = None
    finished: bool = False
    """Whether the last step's model has been exported."""


def checkpoint_store(settings: TrainerSettings) -> CheckpointStore:
    """The checkpoints of the run in `run_dir`."""
    return CheckpointStore(settings.run_dir / "checkpoints", keep=settings.keep_checkpoints)


def model_folder(settings: TrainerSettings) -> Path:
    """Where the finished run's model goes."""
    return settings.run_dir / "model"


def best_folder(settings: TrainerSettings) -> Path:
    """Where the best model so far goes."""
    return settings.run_dir / "best"


def find_start(settings: TrainerSettings) -> Start:
    """What lies in the run's folder; nothing is written. Raises RunFolderError, CheckpointError."""
    identity = next_identity(settings.run_dir, run_id=settings.run_id, resume=settings.resume)
    checkpoint = checkpoint_store(settings).latest()
    if checkpoint is None:
        return Start(identity)
    stored = load_state(checkpoint)
    done = stored.completed_step >= settings.steps
    finished = done and exported_step(model_folder(settings)) == stored.completed_step
    return Start(identity, checkpoint, stored, finished)
