"""Checkpoints: everything that continues a run exactly, written so that a crash leaves a whole one or none.

A checkpoint is a folder that transformers loads as a model (value head included, as TRL stores it), with two files
more: trainer_state.json and learner.pt.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from trainer.run.prompts import Cursor
from trainer.run.runfolder import storing, sync_folder
from trainer.run.space import free_at, in_units
from trainer.tokenizers import Saveable, save_tokenizer

_STATE_FILE = "trainer_state.json"
_LEARNER_FILE = "learner.pt"
_EXPORT_FILE = "export.json"
_FORMAT = 1
_NAME = re.compile(r"step-(\d{6,})")


class CheckpointError(ValueError):
    """A checkpoint can't be read or written by this trainer; the message says why."""


@dataclass(frozen=True)
class Pins:
    """What must not change within a run: the reference's weights, the tokenizer, the reward, what an adapter is of."""

    reference_digest: str
    tokenizer_digest: str
    reward_version: str
    base_digest: str = ""
    """Of the weights under an adapter; empty without one."""


@dataclass(frozen=True)
class RunState:
    """Where a run is, at the boundary after `completed_step`, beside what lies in tensors."""

    run_id: str
    incarnation: int
    pins: Pins
    completed_step: int = 0
    version: int = 0
    cursor: Cursor = field(default_factory=Cursor)
    evaluated_step: int | None = None
    best_reward: float | None = None
    best_step: int | None = None
    log_offsets: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As written to trainer_state.json."""
        return {"format": _FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> RunState:
        """Read what `to_json` made; raises CheckpointError for another format."""
        if stored.pop("format", None) != _FORMAT:
            raise CheckpointError(
                "the checkpoint was written by another version of the trainer: go on with that, or begin a new run"
            )
        return cls(**{**stored, "pins": Pins(**stored["pins"]), "cursor": Cursor(**stored["cursor"])})


class CheckpointStore:
    """The checkpoints of one run, named by their step; the newest `keep` stay, and the best."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        """`folder` is made by the first save."""
        self._folder = folder
        self._keep = keep

    def latest(self) -> Path | None:
        """The newest checkpoint, or None; only whole ones ever have their name."""
        found = self._all()
        return found[-1][1] if found else None

    def oldest_step(self) -> int:
        """The step of the oldest of the newest `keep`; 0 = there is none."""
        found = self._all()[-self._keep :]
        return found[0][0] if found else 0

    def require_room(self, trained: Iterable[Tensor], *, model_bytes: int, with_best: bool) -> str:
        """Say how much room the run takes and how much there is; raises CheckpointError when it is not enough.

        A checkpoint holds what is trained and, as large each, Adam's two moments. One more than `keep` lie there while
        the oldest goes; what lies there now counts. The finished run's model comes beside them, and `with_best` one
        checkpoint and one model more.
        """
        each = 3 * sum(parameter.nbytes for parameter in trained)
        count, models = self._keep + 1 + with_best, 1 + with_best
        there = sum(file.stat().st_size for file in self._folder.rglob("*") if file.is_file())
        needed, free = max(0, count * each + models * model_bytes - there), free_at(self._folder)
        said = f"{count} checkpoints of {in_units(each)}, {models} model{'s' * with_best} of {in_units(model_bytes)}"
        if free < needed:
            raise CheckpointError(
                f"{self._folder} has {in_units(free)} free, but {said} need {in_units(needed)}: make room, lower "
                f"--keep-checkpoints ({self._keep}), or give a --run-dir elsewhere"
            )
        return f"{said}, {in_units(free)} free"

    def save(self, state: RunState, *, model: Saveable, tokenizer: Saveable, learner_state: Mapping[str, Any]) -> Path:
        """Write one, durably, then give it its name and remove the oldest beyond `keep` but for the best.

        One that is there already for this step is kept: the step's outcome is the same however often it is run.
        """
        final = self._folder / f"step-{state.completed_step:06d}"
        if final.exists():
            return final
        with _durable_folder(final) as partial:
            model.save_pretrained(partial)
            save_tokenizer(tokenizer, partial)
            torch.save({"learner": dict(learner_state), "random": _random_states()}, partial / _LEARNER_FILE)
            (partial / _STATE_FILE).write_text(json.dumps(state.to_json(), indent=2), encoding="utf-8")
        for step, old in self._all()[: -self._keep]:
            if step != state.best_step:
                shutil.rmtree(old)
        return final

    def _all(self) -> list[tuple[int, Path]]:
        found = self._folder.iterdir() if self._folder.exists() else ()
        return sorted((int(match[1]), path) for path in found if (match := _NAME.fullmatch(path.name)))


def save_model(folder: Path, *, step: int, model: Saveable, tokenizer: Saveable) -> None:
    """Write the model of a run after `step` to `folder`, replacing what an earlier one left there."""
    with _durable_folder(folder) as partial:
        model.save_pretrained(partial)
        save_tokenizer(tokenizer, partial)
        (partial / _EXPORT_FILE).write_text(json.dumps({"step": step}), encoding="utf-8")


def exported_step(folder: Path) -> int | None:
    """The step whose model `save_model` wrote to `folder`; None = there is none."""
    file = folder / _EXPORT_FILE
    if not file.exists():
        return None
    step: int = json.loads(file.read_text(encoding="utf-8"))["step"]
    return step


def load_state(checkpoint: Path) -> RunState:
    """Where the run was; raises CheckpointError when the file is of another format."""
    return RunState.from_json(json.loads((checkpoint / _STATE_FILE).read_text(encoding="utf-8")))


def load_learner_state(checkpoint: Path) -> dict[str, Any]:
    """What the learner's `load_state_dict` takes; puts every process-wide random generator back as a side effect."""
    stored = torch.load(checkpoint / _LEARNER_FILE, map_location="cpu", weights_only=True)
    _restore_random_states(stored["random"])
    learner: dict[str, Any] = stored["learner"]
    return learner


def realign_parameters(model: torch.nn.Module) -> None:
    """Copy every parameter and buffer to fresh memory (64-byte aligned on CPU), tied ones staying tied.

    safetensors maps files, where tensors begin anywhere; matrix products take another path on unaligned memory and
    differ in the last bits, so a resumed run would drift from one that was never interrupted.
    """
    copies: dict[int, Tensor] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        if id(tensor) not in copies:
            copies[id(tensor)] = tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)


def _random_states() -> dict[str, Any]:
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
    }


def _restore_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    random.setstate(states["python"])
    kind, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))


@contextlib.contextmanager
def _durable_folder(final: Path) -> Iterator[Path]:
    """A new folder to fill, which gets the name `final` once everything in it is on disk; an older `final` goes.

    Whatever lies at `final` is whole at any time; for an instant between two renames there is nothing.
    Raises StorageError.
    """
    partial = final.with_name(f".partial-{final.name}")
    replaced = final.with_name(f".partial-replaced-{final.name}")
    # torch tells a full disk by a RuntimeError.
    with storing(final, (OSError, RuntimeError, SafetensorError)):
        final.parent.mkdir(parents=True, exist_ok=True)
        for interrupted in final.parent.glob(".partial-*"):
            shutil.rmtree(interrupted)
        partial.mkdir()
        try:
            yield partial
            _sync_tree(partial)
        except Exception:
            # On a full disk the next attempt needs this room.
            shutil.rmtree(partial, ignore_errors=True)
            raise
        if final.exists():
            final.rename(replaced)
        partial.rename(final)
        sync_folder(final.parent)
        if replaced.exists():
            shutil.rmtree(replaced)


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            sync_folder(path)
    sync_folder(folder)
