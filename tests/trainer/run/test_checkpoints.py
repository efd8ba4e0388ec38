"""Checkpoints: whole or absent, and enough to go on exactly."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.disks import files_of_at_most
from tests.support.models import make_tiny_gpt2
from trainer.model import AutoModelForCausalLMWithValueHead
from trainer.run.checkpoints import (
    CheckpointError,
    CheckpointStore,
    Pins,
    RunState,
    exported_step,
    load_learner_state,
    load_state,
    realign_parameters,
    save_model,
)
from trainer.run.prompts import Cursor
from trainer.run.runfolder import StorageError


def state_at(step: int) -> RunState:
    return RunState(
        run_id="run",
        incarnation=2,
        pins=Pins("xxh3_128:aa", "sha256:bb", "1"),
        completed_step=step,
        version=step,
        cursor=Cursor(1, 7),
        evaluated_step=step,
        best_reward=0.5,
        best_step=1,
        log_offsets={"metrics": 12},
    )


class Nothing:
    """A model and tokenizer that write one file."""

    def save_pretrained(self, folder: Any) -> None:
        (Path(folder) / "model.safetensors").write_bytes(b"weights")


class Interrupted(Nothing):
    """Writes, and then the process dies."""

    def save_pretrained(self, folder: Any) -> None:
        super().save_pretrained(folder)
        raise KeyboardInterrupt


def save(store: CheckpointStore, step: int, model: Any = None) -> Path:
    return store.save(state_at(step), model=model or Nothing(), tokenizer=Nothing(), learner_state={"step": step})


def test_the_state_comes_back_as_it_was(tmp_path: Path) -> None:
    folder = save(CheckpointStore(tmp_path, keep=2), 3)

    assert load_state(folder) == state_at(3)
    assert load_learner_state(folder) == {"step": 3}


def test_the_newest_few_are_kept_in_the_order_of_their_steps(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)

    for step in (999_998, 999_999, 1_000_000):
        save(store, step)

    assert {path.name for path in tmp_path.iterdir()} == {"step-999999", "step-1000000"}
    assert store.latest() == tmp_path / "step-1000000"


def test_the_best_is_kept_besides_the_newest_until_there_is_a_better_one(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)

    def kept_after(step: int, *, best_step: int | None) -> list[str]:
        state = replace(state_at(step), best_step=best_step)
        store.save(state, model=Nothing(), tokenizer=Nothing(), learner_state={})
        return sorted(path.name[-1] for path in tmp_path.iterdir())

    for step, best_step in enumerate((1, 1, 1, 1), start=1):
        kept = kept_after(step, best_step=best_step)
    assert kept == ["1", "3", "4"]
    assert store.oldest_step() == 3  # what is forgotten does not wait for the best
    assert kept_after(5, best_step=5) == ["4", "5"]
    assert kept_after(6, best_step=5) == ["5", "6"]


def test_an_interrupted_save_leaves_the_one_before_and_is_cleaned_up_by_the_next(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=3)
    before = save(store, 1)

    with pytest.raises(KeyboardInterrupt):
        save(store, 2, Interrupted())

    assert CheckpointStore(tmp_path, keep=3).latest() == before
    save(store, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000002"]


@pytest.mark.parametrize("size", [2, 1000], ids=["weights", "learner"])
def test_a_full_disk_is_told_and_leaves_the_one_before_and_the_room_that_was_taken(tmp_path: Path, size: int) -> None:
    store = CheckpointStore(tmp_path, keep=3)
    before = save(store, 1)

    with files_of_at_most(size), pytest.raises(StorageError, match=r"can't write .*step-000002"):
        save(store, 2)

    assert store.latest() == before
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    save(store, 2)
    assert store.oldest_step() == 1


def test_there_is_no_latest_before_the_first(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep=1)
    assert store.latest() is None
    assert store.oldest_step() == 0


def test_every_random_generator_goes_on_where_it_was(tmp_path: Path) -> None:
    folder = save(CheckpointStore(tmp_path, keep=1), 1)
    expected = (torch.rand(3).tolist(), random.random(), np.random.rand(3).tolist())

    load_learner_state(folder)

    assert (torch.rand(3).tolist(), random.random(), np.random.rand(3).tolist()) == expected


def test_another_format_is_refused(tmp_path: Path) -> None:
    folder = save(CheckpointStore(tmp_path, keep=1), 1)
    file = folder / "trainer_state.json"
    file.write_text(file.read_text().replace('"format": 1', '"format": 2'))

    with pytest.raises(CheckpointError, match="another version of the trainer"):
        load_state(folder)


def test_a_checkpoint_opens_in_transformers_and_keeps_the_value_head(tmp_path: Path) -> None:
    source = make_tiny_gpt2(tmp_path / "model")
    model = AutoModelForCausalLMWithValueHead.from_pretrained(source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    store = CheckpointStore(tmp_path / "checkpoints", keep=1)

    folder = store.save(state_at(1), model=model, tokenizer=tokenizer, learner_state={})

    plain = AutoModelForCausalLM.from_pretrained(folder)
    again = AutoModelForCausalLMWithValueHead.from_pretrained(folder)
    assert all(
        torch.equal(ours, theirs)
        for ours, theirs in zip(model.pretrained_model.parameters(), plain.parameters(), strict=True)
    )
    assert torch.equal(again.v_head.summary.weight, model.v_head.summary.weight)
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == tokenizer.get_vocab()


def test_the_final_model_replaces_an_earlier_one(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "stale").touch()

    save_model(tmp_path / "model", step=3, model=Nothing(), tokenizer=Nothing())

    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"model.safetensors", "export.json"}


def test_the_final_model_tells_its_step_and_what_was_not_exported_has_none(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert exported_step(tmp_path / "model") is None

    save_model(tmp_path / "model", step=3, model=Nothing(), tokenizer=Nothing())

    assert exported_step(tmp_path / "model") == 3


def test_no_half_deleted_model_ever_bears_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path / "model", step=1, model=Nothing(), tokenizer=Nothing())

    def died(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("shutil.rmtree", died)
        with pytest.raises(KeyboardInterrupt):
            save_model(tmp_path / "model", step=2, model=Nothing(), tokenizer=Nothing())
    assert exported_step(tmp_path / "model") == 2
    assert (tmp_path / "model" / "model.safetensors").exists()

    save_model(tmp_path / "model", step=3, model=Nothing(), tokenizer=Nothing())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_realigned_parameters_lie_on_64_bytes_and_tied_ones_stay_tied(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_tiny_gpt2(tmp_path / "model"))
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}

    realign_parameters(model)

    assert all(torch.equal(before[name], tensor) for name, tensor in model.named_parameters())
    assert {tensor.data_ptr() % 64 for tensor in model.parameters()} == {0}
    assert model.lm_head.weight.data_ptr() == model.transformer.wte.weight.data_ptr()


def test_what_the_checkpoints_there_take_counts_as_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, trained = CheckpointStore(tmp_path / "checkpoints", keep=1), [torch.zeros(250)]  # 2 of 3 kB
    free = shutil._ntuple_diskusage(10_000, 4_500, 5_500)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)

    with pytest.raises(CheckpointError, match=r"5\.5 kB free, but 2 checkpoints .* of 100 B need 6\.1 kB: make room"):
        store.require_room(trained, model_bytes=100, with_best=False)

    save(store, 1)
    (tmp_path / "checkpoints" / "step-000001" / "learner.pt").write_bytes(bytes(1_000))
    said = store.require_room(trained, model_bytes=100, with_best=False)
    assert said == "2 checkpoints of 3 kB, 1 model of 100 B, 5.5 kB free"
    with pytest.raises(CheckpointError, match=r"3 checkpoints of 3 kB, 2 models of 100 B need"):
        store.require_room(trained, model_bytes=100, with_best=True)
