"""What a launcher asks for, and what the trainer makes of it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import pytest
from accelerate.state import AcceleratorState
from torch.distributed import distributed_c10d

from rlhf.config import read_settings
from trainer.learning.control import RanksLostError
from trainer.learning.ranks import ALONE
from trainer.run.launch import join_ranks
from trainer.run.loading import SettingsError
from trainer.settings import TrainerSettings

NEEDED = {"model": "m", "policy_server": "127.0.0.1:1", "reward_server": "127.0.0.1:2", "run_dir": "r", "data": "d"}


@pytest.fixture(autouse=True)
def no_launcher() -> Iterator[None]:
    """accelerate keeps one state for the whole process, some of it in the environment."""
    AcceleratorState._reset_state(reset_partial_state=True)
    with patch.dict(os.environ):
        for variable in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(variable, None)
        yield
    AcceleratorState._reset_state(reset_partial_state=True)


def settings(**values: Any) -> TrainerSettings:
    return read_settings(TrainerSettings, {**NEEDED, **values}, {})


def test_a_process_that_nobody_launched_trains_alone() -> None:
    assert join_ranks(settings()) is ALONE
    assert join_ranks(settings(processes=1)) is ALONE


@pytest.mark.parametrize(
    ("variable", "value", "values", "reason"),
    [
        ("ACCELERATE_USE_FSDP", "true", {}, "--sharding fsdp"),
        ("ACCELERATE_USE_DEEPSPEED", "true", {}, "leave --use_deepspeed out"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", {}, "mixed precision bf16, --mixed-precision is no"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", {}, "torch.compile by INDUCTOR"),
        ("WORLD_SIZE", "2", {}, "WORLD_SIZE is 2, but the processes can't connect"),
        ("ACCELERATE_USE_FSDP", "false", {"processes": 2}, "--processes is 2, but 1 train together"),
        ("WORLD_SIZE", "1", {"sharding": "fsdp"}, "there is one"),
    ],
)
def test_what_would_not_be_in_effect_is_refused(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, values: dict[str, Any], reason: str
) -> None:
    monkeypatch.setenv(variable, value)

    with pytest.raises(SettingsError, match=reason):
        join_ranks(settings(**values))


def test_processes_that_do_not_come_in_time_may_come_to_the_next_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed_c10d, "default_pg_timeout", timedelta(seconds=1))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    follower = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for variable, value in follower.items():
        monkeypatch.setenv(variable, value)

    with pytest.raises(RanksLostError, match="did not come together"):
        join_ranks(settings())


def test_a_launcher_may_ask_for_the_precision_that_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")

    assert join_ranks(settings(mixed_precision="bf16")) is ALONE
