"""The release before in a run with today's processes, either way round: its own code, stubs and all."""

from __future__ import annotations

import io
import subprocess
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.integration.training import World, assert_accounted_once, assert_finished
from tests.support.processes import ROOT, process_factory

# Stands in for a release until there is one: the last commit before GetModelResponse got fields 16 and 17.
BEFORE_THE_FIRST_RELEASE = "bf75d73"


def git(*arguments: str) -> bytes:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True).stdout


@pytest.fixture(scope="module")
def previous(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources of the newest release that is merged here."""
    # A tag of this very commit is no release before it.
    tags = git("tag", "--list", "v*", "--merged", "HEAD", "--no-contains", "HEAD", "--sort=-version:refname")
    release = tags.decode().split()[0] if tags else BEFORE_THE_FIRST_RELEASE
    archive = git("archive", release)
    if not archive:
        pytest.skip(f"the history here does not go back to {release}")
    folder = tmp_path_factory.mktemp("previous")
    with tarfile.open(fileobj=io.BytesIO(archive)) as sources:
        sources.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def worlds(previous: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[World, World]]:
    """One of the release before, one of today."""
    folder = tmp_path_factory.mktemp("worlds")
    with process_factory(folder / "processes") as start:
        yield World(folder / "before", partial(start, checkout=previous)), World(folder / "today", start)


def assert_trains(trainers: World, servers: World, run: str) -> None:
    """A run goes through Generate, LogProbs, UpdateWeights and Score, and accounts each prompt once."""
    settings = {"policy_server": servers.policy.address, "steps": 2, "eval_every": 1, "lr_scheduler": None}
    assert_finished(trainers.trainer(run, reward=servers.reward, **settings))
    assert_accounted_once(trainers, run)
    assert trainers.steps_done(run) == 2


@pytest.mark.slow
def test_a_trainer_of_today_trains_with_servers_of_the_release_before(worlds: tuple[World, World]) -> None:
    before, today = worlds
    assert_trains(trainers=today, servers=before, run="new-trainer")


@pytest.mark.slow
def test_a_trainer_of_the_release_before_trains_with_servers_of_today(worlds: tuple[World, World]) -> None:
    before, today = worlds
    assert_trains(trainers=before, servers=today, run="old-trainer")
