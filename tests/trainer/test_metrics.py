"""What a scrape sees beside the statistics."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from trainer.metrics import TrainerMetrics


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def test_the_disk_of_the_runs_folder_is_looked_at_by_every_scrape(registry: CollectorRegistry, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    TrainerMetrics(registry).describe_run("r", folder, kl_target=6.0, logprob_gap_limit=0.1)

    gone = registry.get_sample_value("rlhf_trainer_run_dir_free_bytes")
    folder.mkdir()
    free = registry.get_sample_value("rlhf_trainer_run_dir_free_bytes")
    size = registry.get_sample_value("rlhf_trainer_run_dir_size_bytes")

    assert gone is not None
    assert math.isnan(gone)
    assert free is not None
    assert size is not None
    assert 0 < free < size
    assert registry.get_sample_value("rlhf_trainer_run_info", {"run_id": "r"}) == 1


def test_a_finished_run_learns_that_a_scrape_has_seen_its_end(registry: CollectorRegistry) -> None:
    metrics = TrainerMetrics(registry)
    before = registry.get_sample_value("rlhf_trainer_finished")
    seen: list[bool] = []

    metrics.finish(lambda: seen.append(True))

    assert (before, seen) == (0, [])
    assert registry.get_sample_value("rlhf_trainer_finished") == 1
    assert seen
