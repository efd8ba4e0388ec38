"""One thread for torch: the models are tiny, and the tests of a machine run side by side."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.policy_server.engine import harness


@pytest.fixture(autouse=True, scope="session")
def one_torch_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=list(harness.ENGINES))
def each_engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test once for each engine, with `harness.running` over it; returns the engine's name."""
    name: str = request.param
    monkeypatch.setattr(harness, "tested", name)
    return name
