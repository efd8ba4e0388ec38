"""One start of a run, before and beside its loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from rlhf.config import read_settings
from trainer.metrics import TrainerMetrics
from trainer.run.assembly import run
from trainer.run.checkpoints import CheckpointStore, Pins, RunState, save_model
from trainer.run.loading import SettingsError
from trainer.run.progress import Progress
from trainer.run.runfolder import RunIdentity, store_identity
from trainer.run.waiting import WaitBoard
from trainer.settings import TrainerSettings


class Unloadable:
    """What a checkpoint is made of here: a run that does not end at once stops at loading it."""

    def save_pretrained(self, folder: Any) -> None:
        (Path(folder) / "config.json").write_text("{}", encoding="utf-8")


async def resume(folder: Path, *, steps: int) -> int:
    settings = read_settings(
        TrainerSettings,
        {
            "model": "model",
            "policy_server": "127.0.0.1:1",
            "reward_server": "127.0.0.1:2",
            "run_dir": folder,
            "data": "data.jsonl",
            "steps": steps,
            "resume": True,
        },
        {},
    )
    metrics = TrainerMetrics(CollectorRegistry())
    waits = WaitBoard(metrics)
    return await run(settings, metrics=metrics, progress=Progress(steps=steps, waits=waits, live=False), waits=waits)


@pytest.mark.parametrize(("exported", "finished"), [(4, True), (2, False), (None, False)])
async def test_a_run_is_finished_once_the_model_of_its_last_checkpoint_is_exported(
    tmp_path: Path, exported: int | None, finished: bool
) -> None:
    store_identity(tmp_path, RunIdentity("run", 1))
    state = RunState("run", 1, Pins("xxh3_128:aa", "sha256:bb", "1"), completed_step=4)
    CheckpointStore(tmp_path / "checkpoints", keep=1).save(
        state, model=Unloadable(), tokenizer=Unloadable(), learner_state={}
    )
    if exported is not None:
        save_model(tmp_path / "model", step=exported, model=Unloadable(), tokenizer=Unloadable())

    if finished:
        assert await resume(tmp_path, steps=4) == 0
    else:
        with pytest.raises(SettingsError, match="step-000004"):
            await resume(tmp_path, steps=4)
