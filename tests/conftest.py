"""Fixtures for every test. Nothing here imports torch: tests of the base install must not pay for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.support.processes import StartProcess, process_factory

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # equal bits are promised on the CPU only; processes inherit it
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the suite runs in several processes on few cores
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# How long an example takes says nothing, on a machine that has other work.
settings.register_profile("any speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any speed")


@pytest.fixture
def start_process(tmp_path: Path) -> Iterator[StartProcess]:
    """Start real processes of ours; none outlives the test."""
    with process_factory(tmp_path / "processes") as start:
        yield start
