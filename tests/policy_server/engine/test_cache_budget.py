"""Memory for key-value caches: what it holds, what is refused, what waits, and how much there is."""

from __future__ import annotations

import asyncio
from pathlib import Path

import psutil
import pytest
import torch
from transformers import GPT2Config

from policy_server.engine.batch import BatchEngine
from policy_server.engine.cache import SPARE_COLUMNS, held_bytes
from policy_server.engine.memory import free_bytes
from policy_server.engine.model import ServedModel
from tests.policy_server.engine.architectures import COMMON, loaded, model_from
from tests.policy_server.engine.harness import Watcher, generate, request

TOKEN_BYTES = 2 * 2 * 8 * 4  # keys and values of two layers, 8 wide, float32


def _engine(cache_bytes: int | None, *, watcher: Watcher | None = None, **settings: object) -> BatchEngine:
    model = model_from(GPT2Config(n_embd=8, n_layer=2, n_head=2, n_positions=64, **COMMON))
    return BatchEngine(loaded(model), cache_bytes=cache_bytes, pack_weights=False, observer=watcher, **settings)  # type: ignore[arg-type]


def test_what_a_model_says_its_cache_takes_is_what_it_takes() -> None:
    served = ServedModel(
        "policy", model_from(GPT2Config(n_embd=8, n_layer=2, n_head=2, n_positions=64, **COMMON)), weights_digest=""
    )
    cache = served.new_cache()
    ids = torch.ones((3, 10), dtype=torch.long)
    with torch.inference_mode():
        served.logits(ids, torch.ones_like(ids), keep=1, cache=cache)
    assert held_bytes(cache) == 3 * served.cache_bytes(10) == 3 * TOKEN_BYTES * (10 + SPARE_COLUMNS)


def test_a_context_that_the_memory_does_not_hold_is_lowered_to_what_it_does(caplog: pytest.LogCaptureFixture) -> None:
    described = _engine((20 + SPARE_COLUMNS) * TOKEN_BYTES).describe("policy")
    assert (described.max_context_tokens, described.max_cached_tokens) == (20, 20 + SPARE_COLUMNS)
    assert "max_context_tokens is 20, not 64" in caplog.text


@pytest.mark.parametrize(
    ("tokens", "context", "message"),
    [
        (20, 30, "hold 20 tokens of a completion of the policy, and max_context_tokens is 30"),
        (1, None, "hold 1 tokens"),
    ],
)
def test_too_little_memory_is_refused_at_the_start(tokens: int, context: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _engine((tokens + SPARE_COLUMNS) * TOKEN_BYTES, max_context_tokens=context)


def test_unset_it_is_what_is_free_and_a_context_fits() -> None:
    assert _engine(None).describe("policy").max_context_tokens == 64


@pytest.mark.parametrize("reproducible", [False, True])
async def test_completions_wait_for_room_and_all_of_them_finish(reproducible: bool) -> None:
    most = 3 * (24 + SPARE_COLUMNS) * TOKEN_BYTES
    watcher = Watcher()
    engine = _engine(most, watcher=watcher, reproducible=reproducible)
    await engine.start()
    try:
        wanted = [request([1, 2, 3, 4], name=str(each), n=4, max_new_tokens=20, min_new_tokens=20) for each in range(3)]
        answers = await asyncio.gather(*(generate(engine, each) for each in wanted))
    finally:
        await engine.stop(finish_within=0)
    assert [[len(each.token_ids) for each in answer] for answer in answers] == [[20] * 4] * 3
    assert watcher.most_rows == 3
    assert 0 < watcher.most_cache_bytes <= most


def test_a_container_has_what_its_limit_leaves_where_that_is_less(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 700\ninactive_file 150\n")
    (tmp_path / "memory.max").write_text("1000\n")
    assert free_bytes(cpu, cgroup=tmp_path) == 1000 - 900 + 150
    (tmp_path / "memory.max").write_text("max\n")
    assert 0 < free_bytes(cpu, cgroup=tmp_path) <= psutil.virtual_memory().total
    assert 0 < free_bytes(cpu, cgroup=tmp_path / "absent") <= psutil.virtual_memory().total
