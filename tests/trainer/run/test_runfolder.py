"""The run's folder: who may use it, and what a restart finds there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.disks import files_of_at_most
from trainer.run.runfolder import (
    JsonLines,
    RunFolderError,
    RunIdentity,
    StorageError,
    lock_run_folder,
    next_identity,
    store_identity,
)


def test_each_start_is_a_new_incarnation_of_the_same_run(tmp_path: Path) -> None:
    first = next_identity(tmp_path, run_id=None, resume=True)
    store_identity(tmp_path, first)

    second = next_identity(tmp_path, run_id=None, resume=True)

    assert second == RunIdentity(first.run_id, first.incarnation + 1)


def test_a_fresh_run_refuses_a_folder_that_holds_one(tmp_path: Path) -> None:
    store_identity(tmp_path, RunIdentity("one", 1))

    with pytest.raises(RunFolderError, match="--resume"):
        next_identity(tmp_path, run_id=None, resume=False)


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()

    with pytest.raises(RunFolderError, match=r"thesis\.tex"):
        next_identity(tmp_path, run_id=None, resume=True)


def test_another_runs_folder_is_refused(tmp_path: Path) -> None:
    store_identity(tmp_path, RunIdentity("one", 1))

    with pytest.raises(RunFolderError, match="'one', not 'two'"):
        next_identity(tmp_path, run_id="two", resume=True)


def test_two_trainers_never_share_a_folder(tmp_path: Path) -> None:
    with lock_run_folder(tmp_path):
        with pytest.raises(RunFolderError, match="another trainer"), lock_run_folder(tmp_path):
            pass
        assert next_identity(tmp_path, run_id="one", resume=False) == RunIdentity("one", 1)
    with lock_run_folder(tmp_path):
        pass


def test_lines_after_the_checkpoint_are_cut_off_when_a_run_is_resumed(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    lines = JsonLines(file, keep_bytes=0)
    lines.write({"step": 1})
    offset = lines.sync()
    lines.write({"step": 2})
    lines.close()

    resumed = JsonLines(file, keep_bytes=offset)
    resumed.write({"step": "again"})
    resumed.close()

    assert file.read_text() == '{"step": 1}\n{"step": "again"}\n'


def test_a_file_shorter_than_its_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="shorter than its checkpoint"):
        JsonLines(tmp_path / "metrics.jsonl", keep_bytes=10)


def test_a_full_disk_is_told_with_the_file_and_costs_only_what_was_not_written(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl", keep_bytes=0)
    lines.write({"step": 1})
    offset = lines.sync()

    with files_of_at_most(offset + 5):
        with pytest.raises(StorageError, match=r"can't write .*metrics\.jsonl: File too large"):
            lines.write({"step": 2})
        lines.close()

    resumed = JsonLines(tmp_path / "metrics.jsonl", keep_bytes=offset)
    resumed.write({"step": "again"})
    resumed.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": "again"}\n'


def test_a_full_disk_leaves_the_identity_as_it_was(tmp_path: Path) -> None:
    store_identity(tmp_path, RunIdentity("one", 1))

    with files_of_at_most(5), pytest.raises(StorageError, match=r"run\.json"):
        store_identity(tmp_path, RunIdentity("one", 2))

    assert next_identity(tmp_path, run_id=None, resume=True) == RunIdentity("one", 2)
