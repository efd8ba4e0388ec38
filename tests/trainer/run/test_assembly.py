"""One start of a run, before and beside its loop."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry

from rlhf.config import read_settings
from rlhf.metrics import Pulse
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


async def resume(folder: Path, *, steps: int, **values: Any) -> int:
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
            **values,
        },
        {},
    )
    metrics = TrainerMetrics(CollectorRegistry())
    waits = WaitBoard(metrics)
    progress = Progress(steps=steps, waits=waits, live=False)
    return await run(settings, metrics=metrics, progress=progress, waits=waits, pulse=Pulse())


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


async def test_a_reproducible_run_sets_up_cuda_before_anything_may_start_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        with pytest.raises(SettingsError):
            await resume(tmp_path, steps=1, reproducible=True)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
