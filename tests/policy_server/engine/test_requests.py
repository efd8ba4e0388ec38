from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
import pytest
import torch

from policy_server.engine import worker
from policy_server.engine.generation import Generation, Row
from policy_server.engine.protocol import FinishReason, InFlight, Priority, ScoringRequest, WeightsPrecondition
from rlhf.failures import RpcFailure
from tests.policy_server.engine.architectures import loaded, make_model
from tests.policy_server.engine.harness import FIRST, SECOND, Watcher, generate, request, running, until

pytestmark = pytest.mark.usefixtures("each_engine")

LONG = {"max_new_tokens": 120, "min_new_tokens": 120}
PROMPT = [1, 2]


@pytest.mark.parametrize("how", ["aclose", "drop", "cancel the consumer", "by name"])
async def test_a_request_that_nobody_waits_for_gives_its_rows_back_within_a_step(how: str) -> None:
    watcher = Watcher()
    async with running(loaded(make_model("gpt2")), observer=watcher) as engine:
        watcher.pause_after(1)
        kept = asyncio.create_task(generate(engine, request([3], **LONG)))
        await until(lambda: watcher.held)
        stream = engine.submit(request([1, 2], name="left", n=5, **LONG))
        watcher.pause_after(3)
        await anext(stream)
        await until(lambda: watcher.held)
        assert watcher.decoded_batches[-1] == 6
        if how == "aclose":
            async with aclosing(stream):
                pass
        elif how == "by name":
            engine.cancel("left")
        elif how == "drop":
            del stream
            gc.collect()
        else:
            waits = asyncio.create_task(_exhaust(stream))
            await until(lambda: stream._items.empty())
            waits.cancel()
            await asyncio.gather(waits, return_exceptions=True)
        held_at = len(watcher.decoded_batches)
        watcher.resume()
        [completion] = await kept
        if how == "by name":
            with pytest.raises(RpcFailure, match="cancelled"):
                await _exhaust(stream)
    assert watcher.decoded_batches[held_at] == 1
    assert watcher.cancelled_completions == 5
    assert completion.finish_reason is FinishReason.LENGTH


async def test_a_finished_or_unknown_request_is_not_cancelled() -> None:
    watcher = Watcher()
    async with running(loaded(make_model("gpt2")), observer=watcher) as engine:
        stream = engine.submit(request([1], max_new_tokens=2))
        await _exhaust(stream)
        await stream.aclose()
        engine.cancel("request")
        engine.cancel("unknown")
        await generate(engine, request([1], max_new_tokens=2))
    assert watcher.cancelled_completions == 0


async def test_a_full_queue_refuses_with_a_time_to_come_back() -> None:
    watcher = Watcher()
    async with running(loaded(make_model("gpt2")), max_batch_rows=1, max_queue_requests=2, observer=watcher) as engine:
        watcher.pause_after(1)
        first = asyncio.create_task(generate(engine, request([1], **LONG)))
        await until(lambda: watcher.held)
        others = [engine.submit(request([2], max_new_tokens=2)) for _ in range(2)]
        with pytest.raises(RpcFailure) as of_generation:
            engine.submit(request([3]))
        with pytest.raises(RpcFailure) as of_scoring:
            await engine.log_probs(ScoringRequest("r", "policy", [([1], [2])]))
        await others.pop().aclose()
        watcher.pause_after(2)
        await until(lambda: watcher.waiting == 1)
        others.append(engine.submit(request([4], max_new_tokens=2)))
        watcher.resume()
        await asyncio.gather(first, *map(_exhaust, others))
    for caught in (of_generation, of_scoring):
        assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert caught.value.retry_after is not None
        assert 0 < caught.value.retry_after <= 30


async def test_every_kind_of_end_gives_its_place_in_the_queue_back() -> None:
    async with running(loaded(make_model("gpt2")), max_batch_rows=2, max_queue_requests=1) as engine:
        behind = WeightsPrecondition(exact=FIRST)
        for _ in range(3):
            await generate(engine, request([1], n=3, max_new_tokens=2))
            await generate(engine, request([1], completion_prefix=(1, 2), max_new_tokens=2))
            await engine.log_probs(ScoringRequest("r", "policy", [([1], [2])]))
            with pytest.raises(RpcFailure, match="live"):
                await generate(engine, request([1], weights=behind))
            with pytest.raises(RpcFailure, match="live"):
                await engine.log_probs(ScoringRequest("r", "policy", [([1], [2])], weights=behind))
        with pytest.raises(RpcFailure, match="not found"):
            engine.submit(request([1], model="unknown"))
        await generate(engine, request([1], max_new_tokens=2))


async def test_interactive_requests_pass_waiting_bulk_ones() -> None:
    watcher = Watcher()
    ends: list[str] = []

    async def run(name: str, priority: Priority) -> None:
        await generate(engine, request([1], name=name, max_new_tokens=3, min_new_tokens=3, priority=priority))
        ends.append(name)

    async with running(loaded(make_model("gpt2")), max_batch_rows=1, observer=watcher) as engine:
        watcher.pause_after(1)
        tasks = [asyncio.create_task(run("first", Priority.BULK))]
        await until(lambda: watcher.held)
        for name, priority in (("bulk a", 2), ("bulk b", 2), ("person a", 1), ("person b", 1)):
            tasks.append(asyncio.create_task(run(name, Priority(priority))))
            await asyncio.sleep(0)
        watcher.resume()
        await asyncio.gather(*tasks)
    assert ends == ["first", "person a", "person b", "bulk a", "bulk b"]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("secret: a single row, so smaller can't be had"), RuntimeError("secret path")]
)
async def test_a_forward_that_fails_fails_its_requests_and_the_engine_goes_on(error: Exception) -> None:
    model = make_model("gpt_neox")
    only_decoding_fails = False

    def fail(_: object, inputs: tuple[torch.Tensor, ...]) -> None:
        rows, tokens = inputs[0].shape[:2]
        if rows * tokens == 1 or not only_decoding_fails:
            raise error

    async with running(loaded(model)) as engine:
        handle = model.gpt_neox.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(RpcFailure) as of_prefill:
            await generate(engine, request([1]))
        with pytest.raises(RpcFailure) as of_scores:
            await engine.log_probs(ScoringRequest("r", "policy", [([1], [2])]))
        only_decoding_fails = True
        stream = engine.submit(request([1, 2], **LONG))
        await anext(stream)
        with pytest.raises(RpcFailure) as of_decoding:
            await _exhaust(stream)
        handle.remove()
        [completion] = await generate(engine, request([1], max_new_tokens=2, min_new_tokens=2))
    for caught in (of_prefill, of_scores, of_decoding):
        assert caught.value.code is grpc.StatusCode.INTERNAL
        assert "secret" not in caught.value.message
    assert len(completion.token_ids) == 2


async def test_what_ran_out_of_memory_succeeds_when_it_is_sent_again_as_told() -> None:
    """The model takes no more than two rows of a forward."""
    model = make_model("gpt_neox")

    def fail(_: object, inputs: tuple[torch.Tensor, ...]) -> None:
        rows, tokens = inputs[0].shape[:2]
        if max(rows, tokens // len(PROMPT)) > 2:  # packed rows lie one behind the other
            raise torch.OutOfMemoryError("CUDA out of memory")

    async def tries(ask: Callable[[], Awaitable[object]]) -> int:
        for count in range(1, 10):
            try:
                await ask()
                return count
            except RpcFailure as failure:
                told = failure
            assert (told.code, told.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
            assert told.retry_after
        pytest.fail("it never fits")

    async with running(loaded(model)) as engine:
        with model.gpt_neox.layers[1].register_forward_pre_hook(fail):
            asked = request(PROMPT, n=8, max_new_tokens=4, min_new_tokens=4)
            assert await tries(lambda: generate(engine, asked)) == 3
            scored = ScoringRequest("r", "policy", [(PROMPT, [3])] * 8)
            assert await tries(lambda: engine.log_probs(scored)) == 3
            assert await tries(lambda: generate(engine, asked)) == 1
            assert await tries(lambda: engine.log_probs(scored)) == 1


async def test_a_row_that_cannot_be_made_fails_its_own_request_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def row(generation: Generation, index: int, *others: Any) -> Row:
        if generation.request.request_id == "bad" and index == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return Row(generation, index, *others)

    async with running(loaded(make_model("gpt2")), max_queue_requests=1) as engine:
        kept = engine.submit(request([1], **LONG))
        await anext(kept)
        monkeypatch.setattr(worker, "Row", row)
        for _ in range(2):
            with pytest.raises(RpcFailure) as caught:
                await generate(engine, request([2], name="bad", n=4))
            assert caught.value.reason == "OVERLOADED"
        await _exhaust(kept)


async def test_a_fault_of_the_engine_itself_reaches_every_caller_and_the_engine_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watcher = Watcher()
    async with running(loaded(make_model("gpt2")), observer=watcher) as engine:
        watcher.pause_after(1)
        stream = engine.submit(request([1], **LONG))
        await until(lambda: watcher.held)
        with monkeypatch.context() as patch:
            patch.setattr(engine._worker, "_admit", lambda: 1 / 0)
            watcher.resume()
            with pytest.raises(RpcFailure) as of_generation:
                await _exhaust(stream)
            with pytest.raises(RpcFailure) as of_another:
                await generate(engine, request([1]))
        await generate(engine, request([1], max_new_tokens=2))
    assert of_generation.value.code is of_another.value.code is grpc.StatusCode.INTERNAL


async def test_logits_that_are_not_finite_fail_only_what_they_belong_to() -> None:
    model, reference = make_model("gpt2"), make_model("gpt2")
    with torch.no_grad():
        reference.transformer.wpe.weight[4:] = torch.nan
    async with running(loaded(model, reference)) as engine:
        with pytest.raises(RpcFailure) as caught:
            await generate(engine, request([1], model="reference", max_new_tokens=10, min_new_tokens=10))
        await generate(engine, request([1]))
    assert caught.value.code is grpc.StatusCode.INTERNAL


async def test_stopping_lets_what_runs_finish_and_refuses_what_is_new() -> None:
    watcher = Watcher()
    async with running(loaded(make_model("gpt2")), max_batch_rows=1, observer=watcher) as engine:
        watcher.pause_after(1)
        tasks = [asyncio.create_task(generate(engine, request([i], max_new_tokens=20))) for i in range(3)]
        await until(lambda: watcher.held)
        stopping = asyncio.create_task(engine.stop(finish_within=60))
        await asyncio.sleep(0)
        with pytest.raises(RpcFailure) as caught:
            engine.submit(request([1]))
        watcher.resume()
        await asyncio.gather(stopping, *tasks)
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE


async def test_stopping_ends_what_cannot_finish_in_time_as_unavailable() -> None:
    watcher = Watcher()
    async with running(loaded(make_model("gpt2")), max_batch_rows=1, score_tokens=4, observer=watcher) as engine:
        watcher.pause_after(1)
        tasks = [
            asyncio.create_task(generate(engine, request([1], **LONG))),
            asyncio.create_task(generate(engine, request([2], **LONG))),
            asyncio.create_task(engine.log_probs(ScoringRequest("r", "policy", [([1], [2])] * 99))),
        ]
        await until(lambda: watcher.held)
        tasks.append(asyncio.create_task(engine.load_weights({}, SECOND, if_current=None, in_flight=InFlight.WAIT)))
        stopping = asyncio.create_task(engine.stop(finish_within=0.0))
        await asyncio.sleep(0)
        watcher.resume()
        await stopping
        results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [isinstance(each, RpcFailure) and each.code is grpc.StatusCode.UNAVAILABLE for each in results] == [True] * 4


async def test_an_engine_that_was_not_started_is_unavailable() -> None:
    async with running(loaded(make_model("gpt2"))) as engine:
        pass
    with pytest.raises(RpcFailure) as caught:
        engine.submit(request([1]))
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE


async def _exhaust(stream: object) -> None:
    with contextlib.suppress(StopAsyncIteration):
        async for _ in stream:  # type: ignore[attr-defined]
            pass
