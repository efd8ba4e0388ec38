"""What integration tests share: processes cost seconds to start."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.training import World, assert_finished, small_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A model, data, a policy server and a reward server.

    Fixtures that make a run in it are of its scope: a worker that comes back to a module must not make the run again.
    """
    with small_world(tmp_path_factory.mktemp("world")) as world:
        yield world


@pytest.fixture(scope="session")
def uninterrupted(world: World) -> str:
    """The name of a finished run that nothing disturbed."""
    assert_finished(world.trainer("uninterrupted"))
    return "uninterrupted"
