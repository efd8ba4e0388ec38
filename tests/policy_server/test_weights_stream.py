"""UpdateWeights from a stream: what goes live, what is refused, and that a refused one leaves no trace."""

from __future__ import annotations

import asyncio
import copy
import gc
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from policy_server import metrics, updates
from policy_server.engine.protocol import WeightsVersion
from policy_server.staging import Staging
from rlhf.policy.v1 import policy_pb2
from rlhf.weights.v1 import weights_pb2
from tests.policy_server.harness import (
    Served,
    Stream,
    chunk,
    chunks_of,
    generate,
    greedy,
    manifest_of,
    publish,
    refused,
    serving,
    update,
    version,
    weights_of,
)
from tests.support.models import make_tiny_gpt2

INVALID = grpc.StatusCode.INVALID_ARGUMENT
FAILED = grpc.StatusCode.FAILED_PRECONDITION
ABORTED = grpc.StatusCode.ABORTED
APPLIED, STAGING = weights_pb2.UPDATE_STATE_APPLIED, weights_pb2.UPDATE_STATE_STAGING
HEAD = "lm_head.weight"
EMBEDDING = "transformer.wte.weight"
BIAS = "transformer.ln_f.bias"


async def state(served: Served, update_id: str) -> int:
    answer = await served.weights.GetWeights(weights_pb2.GetWeightsRequest(update_id=update_id))
    return int(answer.state)


async def live(served: Served) -> policy_pb2.WeightsVersion:
    return (await served.weights.GetWeights(weights_pb2.GetWeightsRequest())).live


# What goes live


async def test_a_published_model_generates_as_if_it_had_been_loaded(
    served: Served, tiny_model: Path, other_model: Path
) -> None:
    before = await greedy(served)
    digest = (await served.policy.GetModel(policy_pb2.GetModelRequest())).weights_digest

    answer = await publish(served, update(weights_of(other_model), version(1)))

    async with serving(other_model) as loaded:
        assert await greedy(served) == await greedy(loaded) != before
    assert answer.state == APPLIED
    assert answer.live == version(1)
    assert await state(served, "run-a/1/1") == APPLIED
    assert (await served.policy.GetModel(policy_pb2.GetModelRequest())).weights_digest == digest != ""
    reference = await served.policy.GetModel(policy_pb2.GetModelRequest(model="reference"))
    assert reference.weights == policy_pb2.WeightsVersion()
    assert reference.weights_digest == digest


async def test_parts_come_in_concurrent_streams_and_swap_with_the_last(served: Served, other_model: Path) -> None:
    parts = [update(weights_of(other_model), version(1), part=part, parts=3) for part in range(3)]

    answers = await asyncio.gather(*(publish(served, part) for part in parts))

    assert sorted(answer.state for answer in answers) == [STAGING, STAGING, APPLIED]
    assert await live(served) == version(1)


async def test_tied_embeddings_may_be_sent_by_either_name_or_both(served: Served, other_model: Path) -> None:
    tensors = weights_of(other_model)
    head_only = {HEAD: tensors[EMBEDDING], **{name: value for name, value in tensors.items() if name != EMBEDDING}}
    both = {HEAD: tensors[EMBEDDING].clone(), **tensors}

    await publish(served, update(tensors, version(1)))
    by_embedding = await greedy(served)
    await publish(served, update(head_only, version(2)))
    by_head = await greedy(served)
    await publish(served, update(both, version(3)))

    assert await greedy(served) == by_head == by_embedding


async def test_bfloat16_is_cast_to_what_is_served(served: Served, other_model: Path, tmp_path: Path) -> None:
    rounded = {name: value.bfloat16() for name, value in weights_of(other_model).items()}

    answer = await publish(served, update(rounded, version(1)))

    assert answer.state == APPLIED


async def test_a_partial_update_changes_what_it_lists_and_nothing_else(served: Served, other_model: Path) -> None:
    tensors = weights_of(other_model)
    await publish(served, update({**tensors, BIAS: torch.zeros(32)}, version(1)))
    await publish(served, update({BIAS: tensors[BIAS]}, version(2), partial=True, if_current=version(1)))

    async with serving(other_model) as loaded:
        assert await greedy(served) == await greedy(loaded)
    assert await live(served) == version(2)


async def test_another_run_takes_over_only_by_naming_what_is_live(served: Served, other_model: Path) -> None:
    tensors = weights_of(other_model)
    await publish(served, update(tensors, version(5)))
    other = version(1, run="run-b")

    with refused(FAILED, reason="OTHER_RUN"):
        await publish(served, update(tensors, other))
    with refused(FAILED, reason="CURRENT_MISMATCH"):
        await publish(served, update(tensors, other, if_current=version(4)))
    await publish(served, update(tensors, other, if_current=version(5)))

    assert await live(served) == other


async def test_a_resumed_trainer_counts_again_under_its_new_incarnation(served: Served, other_model: Path) -> None:
    tensors = weights_of(other_model)
    await publish(served, update(tensors, version(12)))

    await publish(served, update(tensors, version(11, incarnation=2)))

    with refused(ABORTED, reason="STALE_VERSION"):
        await publish(served, update(tensors, version(13)))


@pytest.mark.parametrize(
    ("in_flight", "reason", "versions"),
    [
        (weights_pb2.IN_FLIGHT_UNSPECIFIED, policy_pb2.FINISH_REASON_LENGTH, [0, 1]),
        (weights_pb2.IN_FLIGHT_RECOMPUTE, policy_pb2.FINISH_REASON_LENGTH, [0, 1]),
        (weights_pb2.IN_FLIGHT_KEEP_CACHE, policy_pb2.FINISH_REASON_LENGTH, [0, 1]),
        (weights_pb2.IN_FLIGHT_WAIT, policy_pb2.FINISH_REASON_LENGTH, [0]),
        (weights_pb2.IN_FLIGHT_ABORT, policy_pb2.FINISH_REASON_ABORTED, [0]),
    ],
)
async def test_in_flight_says_what_becomes_of_a_completion_that_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    in_flight: weights_pb2.InFlight,
    reason: policy_pb2.FinishReason,
    versions: list[int],
) -> None:
    model = make_tiny_gpt2(tmp_path / "long", context=1024)
    request = policy_pb2.StreamGenerateRequest(request=generate(max_new_tokens=600, min_new_tokens=600))
    async with serving(model) as served:
        swapping = Swapping(served, monkeypatch)
        stream = update(weights_of(model), version(1), in_flight=in_flight)
        deltas = [message.delta async for message in _publish_after_first(served, request, stream, swapping)]

    assert deltas[-1].finish_reason == reason
    spans = [span for delta in deltas for span in delta.spans]
    assert list(dict.fromkeys(span.weights.version for span in spans)) == versions
    kept = in_flight == weights_pb2.IN_FLIGHT_KEEP_CACHE
    assert any(span.HasField("oldest_cache") for span in spans) == kept


async def _publish_after_first(
    served: Served, request: policy_pb2.StreamGenerateRequest, stream: Stream, swapping: Swapping
) -> AsyncIterator[policy_pb2.StreamGenerateResponse]:
    call = aiter(served.policy.StreamGenerate(request))
    yield await anext(call)
    publishing = asyncio.create_task(publish(served, stream))
    await swapping.asked.get()
    swapping.may_go_on.set()
    async for message in call:
        yield message
    await publishing


class Swapping:
    """Holds the engine's thread after a round in which a completion runs, and tells which swaps it is asked for."""

    def __init__(self, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
        self.may_go_on = threading.Event()
        self.asked: asyncio.Queue[WeightsVersion] = asyncio.Queue()
        engine: Any = served.engine
        observer, load_weights = engine._observer, engine.load_weights
        show_running = observer.running

        def running(*, rows: int, cache_bytes: int) -> None:
            show_running(rows=rows, cache_bytes=cache_bytes)
            assert rows == 0 or self.may_go_on.wait(30)

        async def noted(*arguments: Any, **options: Any) -> Any:
            self.asked.put_nowait(arguments[1])
            return await load_weights(*arguments, **options)

        monkeypatch.setattr(observer, "running", running)
        monkeypatch.setattr(engine, "load_weights", noted)


# Idempotence


async def test_a_repeated_update_gets_its_answer_again_and_is_applied_once(served: Served, other_model: Path) -> None:
    tensors = weights_of(other_model)
    first = update(tensors, version(1))
    await publish(served, first)
    await publish(served, update(tensors, version(2)))

    answer = await publish(served, first)

    assert answer.state == APPLIED
    assert answer.live == version(2)


async def test_a_repeated_part_is_stored_once(served: Served, other_model: Path) -> None:
    first, second = (update(weights_of(other_model), version(1), part=part, parts=2) for part in range(2))

    assert (await publish(served, first)).state == STAGING
    assert (await publish(served, first)).state == STAGING
    assert (await publish(served, second)).state == APPLIED
    assert (await publish(served, first)).state == APPLIED


@pytest.mark.parametrize("applied", [True, False])
async def test_an_update_id_stands_for_one_content(served: Served, other_model: Path, applied: bool) -> None:
    tensors = weights_of(other_model)
    await publish(served, update(tensors, version(1), update_id="x", parts=1 if applied else 2))

    with refused(INVALID, "begin.update_id"):
        await publish(served, update(tensors, version(2), update_id="x", parts=1 if applied else 2))


async def test_an_applied_id_with_another_manifest_is_refused(served: Served, other_model: Path) -> None:
    tensors = weights_of(other_model)
    stream = update(tensors, version(1))
    await publish(served, stream)
    stream.manifests = [manifest_of(dict(reversed(tensors.items())))]

    with refused(INVALID, "begin.update_id"):
        await publish(served, stream)


async def test_an_update_that_failed_may_be_sent_again(served: Served, other_model: Path) -> None:
    stream = update(weights_of(other_model), version(1))
    spoiled = copy.deepcopy(stream)
    spoiled.chunks[3].xxh3_64 ^= 1
    with refused(grpc.StatusCode.DATA_LOSS):
        await publish(served, spoiled)
    assert await state(served, "run-a/1/1") == weights_pb2.UPDATE_STATE_FAILED

    assert (await publish(served, stream)).state == APPLIED


async def test_failed_updates_leave_no_staged_copy_in_memory(served: Served, other_model: Path) -> None:
    tensors = weights_of(other_model)

    def staged() -> list[Staging]:
        return [each for each in gc.get_objects() if type(each) is Staging]

    gc.collect()
    before = staged()

    async def nothing_more_is_staged() -> bool:
        return len(staged()) == len(before)

    for number in range(1, 4):
        stream = update(tensors, version(number))
        stream.chunks.pop()
        with refused(INVALID, "chunk"):
            await publish(served, stream)

    await until(nothing_more_is_staged)
    assert held() == 0


@pytest.mark.parametrize("keep_staging", [True, False])
async def test_the_memory_of_an_update_is_kept_for_the_next_or_given_back(
    tiny_model: Path, other_model: Path, keep_staging: bool
) -> None:
    others = weights_of(other_model)
    half = {name: tensor.to(torch.bfloat16) if name == EMBEDDING else tensor for name, tensor in others.items()}
    async with serving(other_model) as loaded, serving(tiny_model, keep_staging=keep_staging) as served:
        initial, other = await greedy(served), await greedy(loaded)
        tokens = []
        for number, tensors in enumerate((others, weights_of(tiny_model), half, others), start=1):
            await publish(served, update(tensors, version(number)))
            assert held() == (sum(tensor.nbytes for tensor in tensors.values()) if keep_staging else 0)
            tokens.append(await greedy(served))
    assert [tokens[0], tokens[1], tokens[3]] == [other, initial, other]


def held() -> int:
    return int(metrics.STAGED_BYTES._value.get())


async def test_without_memory_to_stage_the_writer_is_told_when_to_come_back(
    served: Served, other_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = update(weights_of(other_model), version(1))

    def no_memory(*_: object) -> Staging:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(updates, "Staging", no_memory)
        with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, reason="OVERLOADED") as caught:
            await publish(served, stream)
    assert caught.failure.retry_after
    assert await state(served, "run-a/1/1") == weights_pb2.UPDATE_STATE_FAILED

    assert (await publish(served, stream)).state == APPLIED


# Cut streams


class Feed:
    """Sends messages one by one, when told to."""

    def __init__(self, served: Served) -> None:
        self._call = served.weights.UpdateWeights(timeout=30)

    async def send(self, stream: Stream, count: int) -> None:
        for message, _ in zip(stream.messages(), range(count), strict=False):
            await self._call.write(message)

    async def finish(self) -> weights_pb2.UpdateWeightsResponse:
        await self._call.done_writing()
        answer: weights_pb2.UpdateWeightsResponse = await self._call
        return answer

    def cancel(self) -> None:
        self._call.cancel()


async def until(condition: Callable[[], Awaitable[bool]], within: float = 10.0) -> None:
    async with asyncio.timeout(within):
        while not await condition():  # noqa: ASYNC110 - what changes is on the other side of a socket
            await asyncio.sleep(0.01)


async def test_a_cut_stream_leaves_nothing_behind(served: Served, other_model: Path) -> None:
    tensors = weights_of(other_model)
    before = await greedy(served)
    cut = Feed(served)
    await cut.send(update(tensors, version(1)), 10)
    await until(lambda: _is(served, "run-a/1/1", STAGING))
    cut.cancel()
    await until(lambda: _is(served, "run-a/1/1", weights_pb2.UPDATE_STATE_FAILED))

    assert await greedy(served) == before
    assert await live(served) == policy_pb2.WeightsVersion()
    assert (await publish(served, update(tensors, version(1)))).state == APPLIED


async def test_one_update_at_a_time_is_staged(served: Served, other_model: Path) -> None:
    tensors = weights_of(other_model)
    first = Feed(served)
    await first.send(update(tensors, version(1)), 10)
    await until(lambda: _is(served, "run-a/1/1", STAGING))

    with refused(ABORTED, reason="UPDATE_IN_PROGRESS"):
        await publish(served, update(tensors, version(2)))
    first.cancel()
    await until(lambda: _is(served, "run-a/1/1", weights_pb2.UPDATE_STATE_FAILED))

    assert (await publish(served, update(tensors, version(2)))).state == APPLIED


async def test_a_part_that_waits_for_its_siblings_gives_way_to_another_update(
    served: Served, other_model: Path
) -> None:
    tensors = weights_of(other_model)
    await publish(served, update(tensors, version(1), parts=2))

    assert (await publish(served, update(tensors, version(2)))).state == APPLIED
    assert await state(served, "run-a/1/1") == weights_pb2.UPDATE_STATE_FAILED


async def test_a_part_that_is_sent_anew_replaces_its_former_stream(served: Served, other_model: Path) -> None:
    stream = update(weights_of(other_model), version(1))
    former = Feed(served)
    await former.send(stream, 10)
    await until(lambda: _is(served, "run-a/1/1", STAGING))

    assert (await publish(served, stream)).state == APPLIED
    with refused(ABORTED, reason="UPDATE_IN_PROGRESS"):
        await former.finish()


async def test_a_cut_part_can_be_sent_again_beside_its_siblings(served: Served, other_model: Path) -> None:
    parts = [update(weights_of(other_model), version(1), part=part, parts=2) for part in range(2)]
    await publish(served, parts[0])
    cut = copy.deepcopy(parts[1])
    cut.commit = False
    with refused(INVALID, "commit"):
        await publish(served, cut)

    assert (await publish(served, parts[1])).state == APPLIED


async def _is(served: Served, update_id: str, expected: int) -> bool:
    return await state(served, update_id) == expected


# Callers that go away while the swap waits


async def test_a_swap_that_waits_is_called_off_with_its_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_tiny_gpt2(tmp_path / "long", context=1024)
    stream = update(weights_of(model), version(1), in_flight=weights_pb2.IN_FLIGHT_WAIT)
    async with serving(model) as served:
        swapping = Swapping(served, monkeypatch)
        running = asyncio.create_task(greedy(served, max_new_tokens=900, min_new_tokens=900))
        await until(lambda: _runs(served))
        with refused(grpc.StatusCode.DEADLINE_EXCEEDED):
            await served.weights.UpdateWeights(stream.messages(), timeout=3)
        assert swapping.asked.get_nowait() == WeightsVersion("run-a", 1, 1)
        await until(lambda: _is(served, "run-a/1/1", weights_pb2.UPDATE_STATE_FAILED))
        assert await live(served) == policy_pb2.WeightsVersion()
        swapping.may_go_on.set()
        assert len(await running) == 900

        assert (await publish(served, stream)).state == APPLIED


async def test_an_update_that_is_sent_again_while_it_waits_is_applied_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_tiny_gpt2(tmp_path / "long", context=1024)
    stream = update(weights_of(model), version(1), in_flight=weights_pb2.IN_FLIGHT_WAIT)
    async with serving(model) as served:
        swapping = Swapping(served, monkeypatch)
        running = asyncio.create_task(greedy(served, max_new_tokens=900, min_new_tokens=900))
        await until(lambda: _runs(served))
        first = asyncio.create_task(publish(served, stream))
        await swapping.asked.get()
        second = asyncio.create_task(publish(served, stream))
        await asyncio.sleep(0)
        swapping.may_go_on.set()
        again = await second
        await running

    assert (await first).state == again.state == APPLIED
    assert swapping.asked.empty()


async def _runs(served: Served) -> bool:
    """A completion is running: RUNNING_COMPLETIONS is of the whole test process, one server at a time."""
    return metrics.RUNNING_COMPLETIONS._value.get() > 0


# Mistakes: each spoils a stream that would be whole and right


def spoil(**begin: object) -> Callable[[Stream], None]:
    def change(stream: Stream) -> None:
        stream.begin.MergeFrom(weights_pb2.Begin(**begin))  # type: ignore[arg-type]

    return change


def edit(change: Callable[[Stream], object]) -> Callable[[Stream], None]:
    def spoil_it(stream: Stream) -> None:
        change(stream)

    return spoil_it


def first_tensor(**fields: object) -> Callable[[Stream], None]:
    def change(stream: Stream) -> None:
        spec = stream.manifests[0].tensors[0]
        for name, value in fields.items():
            if name == "shape":
                spec.shape[:] = value  # type: ignore[call-overload]
            else:
                setattr(spec, name, value)

    return change


def drop_tensor(stream: Stream) -> None:
    missing = stream.manifests[0].tensors[-1]
    count = 4
    for extent in missing.shape:
        count *= extent
    stream.begin.total_bytes -= count
    last = len(stream.manifests[0].tensors) - 1
    del stream.manifests[0].tensors[last]
    stream.chunks = [each for each in stream.chunks if each.tensor != last]


def flip_bit(stream: Stream) -> None:
    data = bytearray(stream.chunks[5].data)
    data[0] ^= 1
    stream.chunks[5].data = bytes(data)


def untie(stream: Stream) -> None:
    index = next(i for i, spec in enumerate(stream.manifests[0].tensors) if spec.name == EMBEDDING)
    spec = stream.manifests[0].tensors[index]
    other = torch.zeros(tuple(spec.shape))
    position = len(stream.manifests[0].tensors)
    stream.manifests[0].tensors.append(weights_pb2.TensorSpec(name=HEAD, dtype="F32", shape=spec.shape))
    stream.begin.total_bytes += other.nbytes
    stream.chunks += [chunk(position, each.offset, each.data) for each in chunks_of({HEAD: other})]


MISTAKES: dict[str, tuple[Callable[[Stream], None], grpc.StatusCode, str, str]] = {
    "no update id": (edit(lambda s: s.begin.ClearField("update_id")), INVALID, "begin.update_id", ""),
    "a long update id": (spoil(update_id="é" * 129), INVALID, "begin.update_id", ""),
    "no version": (edit(lambda s: s.begin.ClearField("weights")), INVALID, "begin.weights.run_id", ""),
    "a long run id": (
        spoil(weights=version(9, run="r" * 257)),
        INVALID,
        "begin.weights.run_id",
        "",
    ),
    "an unknown model": (spoil(model="nobody"), grpc.StatusCode.NOT_FOUND, "begin.model", ""),
    "the reference": (spoil(model="reference"), FAILED, "", "FROZEN_MODEL"),
    "a stale version": (edit(lambda s: s.begin.weights.CopyFrom(version(7))), ABORTED, "", "STALE_VERSION"),
    "an older incarnation": (
        edit(lambda s: s.begin.weights.CopyFrom(version(9, incarnation=0))),
        ABORTED,
        "",
        "STALE_VERSION",
    ),
    "another run": (edit(lambda s: s.begin.weights.CopyFrom(version(9, run="b"))), FAILED, "", "OTHER_RUN"),
    "if_current is not live": (spoil(if_current=version(3)), FAILED, "", "CURRENT_MISMATCH"),
    "the initial weights are not live": (
        spoil(if_current=policy_pb2.WeightsVersion()),
        FAILED,
        "",
        "CURRENT_MISMATCH",
    ),
    "partial upon nothing": (spoil(partial=True), INVALID, "begin.if_current", ""),
    "an unknown in_flight": (edit(lambda s: setattr(s.begin, "in_flight", 9)), INVALID, "begin.in_flight", ""),
    "no source": (edit(lambda s: s.begin.ClearField("source")), INVALID, "begin.source", ""),
    "part beyond the count": (spoil(stream=weights_pb2.StreamSource(part=1)), INVALID, "begin.stream.part", ""),
    "no parts": (spoil(stream=weights_pb2.StreamSource(part_count=0)), INVALID, "begin.stream.part_count", ""),
    "too many parts": (spoil(stream=weights_pb2.StreamSource(part_count=65)), INVALID, "begin.stream.part_count", ""),
    "another format": (spoil(format="megatron"), INVALID, "begin.format", ""),
    "an adapter": (spoil(adapter_config_json="{}", model="new"), INVALID, "begin.adapter_config_json", ""),
    "a wrong sum": (edit(lambda s: setattr(s.begin, "total_bytes", 5)), INVALID, "begin.total_bytes", ""),
    "more than there is room for": (
        edit(lambda s: setattr(s.begin, "total_bytes", 1 << 40)),
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "",
        "TOO_LARGE",
    ),
    "a directory without a root": (
        spoil(directory=weights_pb2.DirectorySource(path="x")),
        grpc.StatusCode.PERMISSION_DENIED,
        "",
        "",
    ),
    "an unknown tensor": (first_tensor(name="nobody"), INVALID, "manifest.tensors[0].name", ""),
    "a tensor listed twice": (
        edit(lambda s: s.manifests.append(copy.deepcopy(s.manifests[0]))),
        INVALID,
        "manifest.tensors[0].name",
        "",
    ),
    "an unknown dtype": (first_tensor(dtype="float32"), INVALID, "manifest.tensors[0].dtype", ""),
    "integers": (first_tensor(dtype="I32"), INVALID, "manifest.tensors[0].dtype", ""),
    "a reshaped tensor": (first_tensor(shape=[1, 2, 3]), INVALID, "manifest.tensors[0].shape", ""),
    "a digest in a stream": (first_tensor(xxh3_64=1), INVALID, "manifest.tensors[0].xxh3_64", ""),
    "a missing tensor": (edit(drop_tensor), INVALID, "manifest.tensors", ""),
    "no manifest, chunks": (edit(lambda s: s.manifests.clear()), INVALID, "chunk", ""),
    "no manifest, no chunks": (
        edit(lambda s: (s.manifests.clear(), s.chunks.clear())),
        INVALID,
        "commit",
        "",
    ),
    "an empty manifest": (
        edit(lambda s: s.manifests.__setitem__(0, weights_pb2.Manifest())),
        INVALID,
        "manifest.tensors",
        "",
    ),
    "a manifest above 1 MiB": (
        edit(lambda s: s.manifests[0].tensors.extend([weights_pb2.TensorSpec(name="n" * 1000)] * 1100)),
        INVALID,
        "manifest",
        "",
    ),
    "a chunk of an unlisted tensor": (
        edit(lambda s: s.chunks.insert(0, chunk(999, 0, b"1234"))),
        INVALID,
        "chunk.tensor",
        "",
    ),
    "a chunk beyond its tensor": (
        edit(lambda s: s.chunks.append(chunk(0, 1 << 40, b"1234"))),
        INVALID,
        "chunk.offset",
        "",
    ),
    "an empty chunk": (edit(lambda s: s.chunks.append(chunk(0, 0, b""))), INVALID, "chunk.data", ""),
    "a chunk that is too large": (
        edit(lambda s: s.chunks.insert(0, chunk(0, 0, bytes((4 << 20) - (64 << 10) + 1)))),
        INVALID,
        "chunk.data",
        "",
    ),
    "a byte twice": (edit(lambda s: s.chunks.append(copy.deepcopy(s.chunks[4]))), INVALID, "chunk.offset", ""),
    "a byte never": (edit(lambda s: s.chunks.pop(4)), INVALID, "chunk", ""),
    "a flipped bit": (edit(flip_bit), grpc.StatusCode.DATA_LOSS, "", ""),
    "tied tensors that differ": (edit(untie), INVALID, "manifest.tensors", ""),
    "no commit": (edit(lambda s: setattr(s, "commit", False)), INVALID, "commit", ""),
}


@pytest.fixture(scope="module")
def new_weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return weights_of(make_tiny_gpt2(tmp_path_factory.mktemp("models") / "new", seed=3))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    """One server for all mistakes, with version 7 live; none of them may change what it serves."""
    folder = make_tiny_gpt2(tmp_path_factory.mktemp("models") / "shared")
    tied_twice = 2 * sum(tensor.nbytes for tensor in weights_of(folder).values())
    async with serving(folder, max_staging_bytes=tied_twice) as running:
        await publish(running, update(weights_of(folder), version(7)))
        yield running


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("mistake", MISTAKES)
async def test_a_mistake_gets_its_code_and_the_old_version_keeps_serving(
    shared: Served, new_weights: dict[str, torch.Tensor], mistake: str
) -> None:
    spoil_it, code, field, reason = MISTAKES[mistake]
    before = await greedy(shared)
    stream = update(new_weights, version(8))
    spoil_it(stream)

    with refused(code, field, reason) as caught:
        await publish(shared, stream)
    assert caught.failure.retry_after is None

    assert await greedy(shared) == before
    assert await live(shared) == version(7)


BEGIN = weights_pb2.UpdateWeightsRequest(begin=update({BIAS: torch.zeros(32)}, version(8), update_id="order").begin)
MANIFEST = weights_pb2.UpdateWeightsRequest(manifest=manifest_of({BIAS: torch.zeros(32)}))
COMMIT = weights_pb2.UpdateWeightsRequest(commit=weights_pb2.Commit())


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "begin"),
        ([MANIFEST], "begin"),
        ([COMMIT], "begin"),
        ([weights_pb2.UpdateWeightsRequest()], "message"),
        ([BEGIN, BEGIN], "begin"),
        ([BEGIN, weights_pb2.UpdateWeightsRequest()], "message"),
        ([BEGIN, COMMIT], "commit"),
        ([BEGIN], "commit"),
    ],
)
async def test_messages_out_of_order_are_named(
    shared: Served, messages: list[weights_pb2.UpdateWeightsRequest], field: str
) -> None:
    with refused(INVALID, field):
        await publish(shared, messages)


@pytest.mark.asyncio(loop_scope="module")
async def test_a_manifest_after_a_chunk_is_refused(shared: Served, new_weights: dict[str, torch.Tensor]) -> None:
    messages = list(update(new_weights, version(8)).messages())
    messages.insert(3, messages[1])

    with refused(INVALID, "manifest"):
        await publish(shared, messages)


@pytest.mark.asyncio(loop_scope="module")
async def test_parts_must_repeat_the_same_manifest(shared: Served, new_weights: dict[str, torch.Tensor]) -> None:
    first, second = (update(new_weights, version(8), update_id="parts", part=part, parts=2) for part in range(2))
    second.manifests = [manifest_of(dict(reversed(new_weights.items())))]
    await publish(shared, first)

    with refused(INVALID, "manifest"):
        await publish(shared, second)


@pytest.mark.asyncio(loop_scope="module")
async def test_get_weights_tells_limits_and_refuses_an_unknown_model(shared: Served) -> None:
    answer = await shared.weights.GetWeights(weights_pb2.GetWeightsRequest(update_id="never seen"))

    assert answer.state == weights_pb2.UPDATE_STATE_UNSPECIFIED
    assert not answer.in_place
    assert answer.max_parts == 64
    assert answer.server_instance_id
    assert list(answer.features) == []
    with refused(grpc.StatusCode.NOT_FOUND, "model"):
        await shared.weights.GetWeights(weights_pb2.GetWeightsRequest(model="nobody"))


# A managed server


async def test_a_managed_server_serves_only_after_its_first_publish(tiny_model: Path, other_model: Path) -> None:
    async with serving(tiny_model, managed=True) as served:
        health = health_pb2_grpc.HealthStub(served.channel)

        async def serves(service: str) -> bool:
            answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
            return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

        assert not await serves("rlhf.policy.v1.PolicyService")
        assert await serves("rlhf.weights.v1.WeightsService")
        assert (await served.policy.GetModel(policy_pb2.GetModelRequest())).model == "policy"
        with refused(grpc.StatusCode.UNAVAILABLE) as caught:
            await served.policy.Generate(generate())
        assert "UpdateWeights" in caught.failure.message
        with refused(grpc.StatusCode.UNAVAILABLE):
            await served.policy.StreamGenerate(policy_pb2.StreamGenerateRequest()).read()
        with refused(grpc.StatusCode.UNAVAILABLE):
            await served.policy.LogProbs(policy_pb2.LogProbsRequest())

        await publish(served, update(weights_of(other_model), version(1)))

        await until(lambda: serves("rlhf.policy.v1.PolicyService"))
        await served.policy.Generate(generate())
