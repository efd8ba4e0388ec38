from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.policy_server.harness import Served, serving
from tests.support.models import make_tiny_gpt2


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 with tied embeddings, context 128, vocabulary 257 with EOS 256."""
    return make_tiny_gpt2(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same architecture with other weights."""
    return make_tiny_gpt2(tmp_path_factory.mktemp("models") / "other", seed=1)


@pytest.fixture
async def served(tiny_model: Path) -> AsyncIterator[Served]:
    """A server that serves the tiny model from its start."""
    async with serving(tiny_model) as running:
        yield running
