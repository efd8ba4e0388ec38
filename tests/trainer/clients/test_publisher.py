"""WeightPublisher against a server that keeps weights in memory, and that fails when told to."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
import torch

from rlhf.channel import RetryPolicy
from rlhf.failures import RpcFailure, internal, invalid_argument, permission_denied, too_large
from rlhf.policy.v1 import policy_pb2
from tests.trainer.servers import MemoryWeights, serving
from trainer.clients.publisher import PublishError, WeightPublisher
from trainer.clients.weight_files import written
from trainer.versions import WeightsVersion

FAST = RetryPolicy(initial=0.01, maximum=0.05)
TENSORS = [("a.weight", torch.arange(6.0).reshape(2, 3)), ("b.bias", torch.tensor([1.5], dtype=torch.bfloat16))]


def version(number: int, *, incarnation: int = 1, run_id: str = "run") -> WeightsVersion:
    return WeightsVersion(run_id, incarnation, number)


@contextlib.asynccontextmanager
async def publisher_to(server: MemoryWeights, **options: object) -> AsyncIterator[WeightPublisher]:
    async with serving(server.add_to) as address:
        publisher = WeightPublisher(address, retry=FAST, timeout=10.0, **options)  # type: ignore[arg-type]
        try:
            yield publisher
        finally:
            await publisher.close()


def names(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


async def test_the_server_gets_the_very_bytes_under_their_names() -> None:
    server = MemoryWeights()

    async with publisher_to(server) as publisher:
        await publisher.publish(TENSORS, version(1))

    assert server.tensors == {
        "a.weight": TENSORS[0][1].numpy().tobytes(),
        "b.bias": TENSORS[1][1].view(torch.uint8).numpy().tobytes(),
    }
    assert WeightsVersion.from_proto(server.live) == version(1)
    assert server.updates[0].total_bytes == 26


async def test_a_tensor_above_a_megabyte_is_cut_into_chunks() -> None:
    server = MemoryWeights()
    large = torch.randn(700_000)

    async with publisher_to(server) as publisher:
        await publisher.publish([("large", large)], version(1))

    assert server.tensors["large"] == large.numpy().tobytes()


async def test_weights_go_through_a_folder_that_both_sides_see_and_nothing_stays_there(tmp_path: Path) -> None:
    server = MemoryWeights(root=tmp_path)
    column = torch.arange(6.0).reshape(3, 2)[:, 1]  # not contiguous

    async with publisher_to(server, shared_folder=tmp_path) as publisher:
        await publisher.publish([*TENSORS, ("column", column)], version(1))

    assert server.updates[0].WhichOneof("source") == "directory"
    assert server.tensors["b.bias"] == TENSORS[1][1].view(torch.uint8).numpy().tobytes()
    assert server.tensors["column"] == column.numpy().tobytes()
    assert names(tmp_path) == []


async def test_what_a_killed_trainer_left_in_the_folder_goes_with_the_next_publish(tmp_path: Path) -> None:
    server = MemoryWeights(root=tmp_path)
    (tmp_path / "others").mkdir()
    async with publisher_to(server, shared_folder=tmp_path) as publisher:
        async with written(tmp_path, f"run {publisher.target}", TENSORS) as files:
            shutil.copytree(tmp_path / files.folder, tmp_path / f"{files.folder}left")
        assert len(names(tmp_path)) == 2
        await publisher.publish(TENSORS, version(1))
    assert names(tmp_path) == ["others"]


async def test_a_server_that_reads_no_folder_gets_the_stream_and_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = MemoryWeights()
    async with publisher_to(server, shared_folder=tmp_path) as publisher:
        await publisher.publish(TENSORS, version(1))
    assert server.updates[0].WhichOneof("source") == "stream"
    assert "reads no folder" in caplog.text


async def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    async with publisher_to(MemoryWeights(root=tmp_path), shared_folder=tmp_path / "absent") as publisher:
        with pytest.raises(PublishError, match=r"cannot be written to .*absent"):
            await publisher.publish(TENSORS, version(1))


async def test_a_cut_stream_is_sent_again_until_it_is_live() -> None:
    server = MemoryWeights()
    server.fail_after_begin = [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED]

    async with publisher_to(server) as publisher:
        await publisher.publish(TENSORS, version(1))

    assert len(server.updates) == 3
    assert len({begin.update_id for begin in server.updates}) == 1


async def test_an_answer_that_the_stream_ran_over_is_asked_for_again() -> None:
    server = MemoryWeights()
    server.fail_after_begin = [grpc.StatusCode.INTERNAL] * 3

    async with publisher_to(server) as publisher:
        await publisher.publish(TENSORS, version(1))

    assert len(server.updates) == 4
    assert WeightsVersion.from_proto(server.live) == version(1)


async def test_two_trainers_of_one_run_in_two_folders_cannot_both_publish() -> None:
    server = MemoryWeights()
    async with publisher_to(server) as first:
        second = WeightPublisher(first.target, retry=FAST, timeout=10.0)
        await first.publish(TENSORS, version(0))

        with pytest.raises(PublishError, match="another trainer has the same run id"):
            await second.publish(TENSORS, version(0))
        await second.close()
        await first.ensure()
        await first.publish(TENSORS, version(1))

    assert len(server.updates) == 2


async def test_a_server_that_never_gets_further_than_internal_stops_the_run() -> None:
    server = MemoryWeights()
    server.fail_after_begin = [grpc.StatusCode.INTERNAL] * 100

    async with publisher_to(server) as publisher:
        with pytest.raises(RpcFailure, match="cut as scripted"):
            await publisher.publish(TENSORS, version(1))

    assert len(server.updates) == 11


async def test_a_server_of_a_model_of_another_shape_is_told_with_what_to_do() -> None:
    server = MemoryWeights()
    server.fail_after_begin = [invalid_argument("manifest.tensors[0].shape", "must be [3, 3]")]

    async with publisher_to(server) as publisher:
        with pytest.raises(PublishError, match=r"manifest.tensors\[0\].shape.*start it with the trainer's --model"):
            await publisher.publish(TENSORS, version(1))


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (too_large("too many bytes"), True),
        (invalid_argument("begin.directory.path", "no directory"), False),
        (permission_denied("outside the root"), False),
        (internal("a fault"), None),
    ],
)
async def test_whether_the_server_finds_a_folder_is_read_from_why_it_refuses(
    answer: RpcFailure, found: bool | None
) -> None:
    server = MemoryWeights()
    server.fail_after_begin = [answer]

    async with publisher_to(server) as publisher:
        assert await publisher.finds("a-folder") is found

    assert server.live == policy_pb2.WeightsVersion()


async def test_an_internal_error_that_the_server_explains_is_final() -> None:
    server = MemoryWeights()
    server.fail_after_begin = [internal("a fault")]

    async with publisher_to(server) as publisher:
        with pytest.raises(RpcFailure, match="a fault"):
            await publisher.publish(TENSORS, version(1))

    assert len(server.updates) == 1


async def test_a_lost_answer_is_resolved_by_asking_and_not_by_sending_again() -> None:
    server = MemoryWeights()
    server.lose_answer = [grpc.StatusCode.UNAVAILABLE]

    async with publisher_to(server) as publisher:
        await publisher.publish(TENSORS, version(1))

    assert len(server.updates) == 1


async def test_what_is_frozen_is_sent_once_to_a_server_that_keeps_running() -> None:
    server = MemoryWeights()
    frozen = frozenset({"a.weight"})

    async with publisher_to(server) as publisher:
        await publisher.publish(TENSORS, version(1), frozen=frozen)
        assert server.tensors.keys() == {"a.weight", "b.bias"}
        await publisher.publish(TENSORS, version(2), frozen=frozen)
        assert server.tensors.keys() == {"b.bias"}
        assert [begin.partial for begin in server.updates] == [False, True]
        assert WeightsVersion.from_proto(server.updates[1].if_current) == version(1)
        assert server.updates[1].total_bytes == 2

        server.instance, server.live = "second", policy_pb2.WeightsVersion()
        await publisher.ensure()
        assert server.tensors.keys() == {"a.weight", "b.bias"}


async def test_what_another_start_of_the_trainer_published_is_sent_again_whole(tmp_path: Path) -> None:
    server = MemoryWeights(live=version(7).to_proto(), root=tmp_path)

    async with publisher_to(server, shared_folder=tmp_path) as publisher:
        await publisher.publish(TENSORS, version(5, incarnation=2), frozen={"a.weight"})
        assert server.tensors.keys() == {"a.weight", "b.bias"}
        await publisher.publish(TENSORS, version(6, incarnation=2), frozen={"a.weight"})
        assert server.tensors.keys() == {"b.bias"}


async def test_the_first_publish_replaces_another_runs_weights_by_compare_and_swap_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    other = policy_pb2.WeightsVersion(run_id="other", incarnation=3, version=9)
    server = MemoryWeights(live=other)

    async with publisher_to(server) as publisher:
        await publisher.publish(TENSORS, version(0))
        await publisher.publish(TENSORS, version(1))

    assert server.updates[0].if_current == other
    (line,) = caplog.messages
    assert "over from another run" in line
    assert "our_run='run'" in line
    assert "their_run='other'" in line


async def test_a_newer_incarnation_of_the_run_stops_this_trainer() -> None:
    server = MemoryWeights(live=policy_pb2.WeightsVersion(run_id="run", incarnation=2, version=0))

    async with publisher_to(server) as publisher:
        with pytest.raises(PublishError, match="another trainer of this run is newer"):
            await publisher.publish(TENSORS, version(7, incarnation=1))

    assert server.updates == []


async def test_a_restarted_server_gets_the_last_weights_again_after_it_was_checked() -> None:
    server = MemoryWeights()
    checked: list[str] = []

    async def check() -> None:
        checked.append(server.instance)

    async with publisher_to(server, on_new_server=check) as publisher:
        await publisher.publish(TENSORS, version(4))
        server.instance, server.live, server.tensors = "second", policy_pb2.WeightsVersion(), {}
        await publisher.ensure()
        await publisher.ensure()

    assert checked == ["first", "second"]
    assert set(server.tensors) == {"a.weight", "b.bias"}
    assert [begin.weights.version for begin in server.updates] == [4, 4]
    assert len({begin.update_id for begin in server.updates}) == 2


async def test_a_server_that_another_trainer_took_over_is_not_taken_back() -> None:
    server = MemoryWeights()

    async with publisher_to(server) as publisher:
        await publisher.publish(TENSORS, version(1))
        server.live = policy_pb2.WeightsVersion(run_id="other", incarnation=1, version=1)
        with pytest.raises(PublishError, match="another trainer took it over"):
            await publisher.ensure()

    assert len(server.updates) == 1


async def test_before_the_first_publish_there_is_nothing_to_ensure() -> None:
    server = MemoryWeights()

    async with publisher_to(server) as publisher:
        await publisher.ensure()

    assert server.updates == []
