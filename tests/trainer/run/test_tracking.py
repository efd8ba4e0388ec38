"""What TensorBoard and Weights & Biases are told, read from their own files."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import wait_for
from trainer.run.tracking import open_trackers
from trainer.settings import TrackerName


def test_a_tracker_whose_library_is_missing_names_the_flag_and_the_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)

    with pytest.raises(ImportError, match=r"--track wandb: pip install .*\[wandb\]"):
        open_trackers([TrackerName.WANDB], run_id="run", folder=tmp_path, settings={}, resumed_step=None)


@pytest.mark.parametrize(("checkpoint", "again"), [(1, (2, 3)), (None, (0, 1, 2, 3))])
def test_tensorboard_gets_every_number_once_although_steps_are_run_again(
    tmp_path: Path, checkpoint: int | None, again: tuple[int, ...]
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resumed, steps in ((None, (0, 1, 2, 3)), (checkpoint, again)):
        (tracker,) = open_trackers(
            [TrackerName.TENSORBOARD], run_id="run", folder=tmp_path, settings={}, resumed_step=resumed
        )
        for step in steps:
            tracker.log(step, {"objective/kl": float(step)})
        tracker.close()

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    points = [(point.step, point.value) for point in events.Scalars("objective/kl")]
    assert points == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0)]


def test_wandb_gets_every_number_with_its_step_as_the_axis(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    (tracker,) = open_trackers(
        [TrackerName.WANDB], run_id="run.1", folder=tmp_path, settings={"batch_size": 8}, resumed_step=None
    )
    tracker.log(0, {"evaluation/reward_mean": 0.25})
    tracker.log(1, {"objective/kl": 1.5})
    tracker.close()

    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    # W&B's own process writes on for a moment after it has answered that the run is finished.
    records = wait_for(lambda: _finished(list(_wandb_records(file))), within=60, what="the end of W&B's file")
    (begun,) = [record.run for record in records if record.HasField("run")]
    config = {item.key: json.loads(item.value_json) for item in begun.config.update}
    history = [_logged(record.history) for record in records if record.HasField("history")]
    (axis,) = [record.metric for record in records if record.HasField("metric") and record.metric.glob_name == "*"]
    assert (begun.run_id, config["batch_size"], axis.step_metric) == ("run.1", 8, "step")
    assert history == [{"step": 0, "evaluation/reward_mean": 0.25}, {"step": 1, "objective/kl": 1.5}]


def _finished(records: list[Any]) -> list[Any] | None:
    return records if any(record.HasField("exit") for record in records) else None


def _logged(history: Any) -> dict[str, Any]:
    """What we logged of one record; names with an underscore in front are W&B's own."""
    named = {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in history.item}
    return {name: value for name, value in named.items() if not name.startswith("_")}


def _wandb_records(file: Path) -> Iterator[Any]:
    """The records of an offline run: LevelDB's log format, blocks of 32 KiB, after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        if at + 7 + length > len(content):
            return  # not all of it is written yet
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""
