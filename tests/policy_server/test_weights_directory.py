"""UpdateWeights from safetensors files below the server's root."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from rlhf.policy.v1 import policy_pb2
from rlhf.weights.v1 import weights_pb2
from tests.policy_server.harness import (
    Served,
    Stream,
    chunks_of,
    greedy,
    manifest_of,
    publish,
    refused,
    serving,
    version,
    weights_of,
)

INVALID = grpc.StatusCode.INVALID_ARGUMENT
DENIED = grpc.StatusCode.PERMISSION_DENIED
DATA_LOSS = grpc.StatusCode.DATA_LOSS


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    folder.mkdir()
    return folder


@pytest.fixture
async def served(tiny_model: Path, root: Path) -> AsyncIterator[Served]:
    async with serving(tiny_model, weights_root=root) as running:
        yield running


def from_directory(tensors: dict[str, Tensor], path: str) -> Stream:
    return Stream(
        weights_pb2.Begin(
            update_id="d",
            weights=version(1),
            directory=weights_pb2.DirectorySource(path=path),
            total_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        ),
        [manifest_of(tensors, digests=True)],
        [],
    )


async def unchanged(served: Served) -> bool:
    answer = await served.weights.GetWeights(weights_pb2.GetWeightsRequest())
    return bool(answer.live == policy_pb2.WeightsVersion())


async def test_files_are_read_before_the_answer_and_never_after_it(
    served: Served, root: Path, other_model: Path
) -> None:
    tensors = weights_of(other_model)
    names = list(tensors)
    folder = root / "run" / "step-1"
    folder.mkdir(parents=True)
    save_file({name: tensors[name] for name in names[:3]}, folder / "a.safetensors")
    save_file({**{name: tensors[name] for name in names[3:]}, "v_head.bias": torch.ones(1)}, folder / "b.safetensors")

    answer = await publish(served, from_directory(tensors, "run/step-1"))
    for file in folder.iterdir():
        file.write_bytes(bytes(file.stat().st_size))
    shutil.rmtree(folder)

    assert answer.state == weights_pb2.UPDATE_STATE_APPLIED
    async with serving(other_model) as loaded:
        assert await greedy(served) == await greedy(loaded)


async def test_a_server_with_a_root_says_so(served: Served) -> None:
    answer = await served.weights.GetWeights(weights_pb2.GetWeightsRequest())

    assert list(answer.features) == ["directory"]


async def test_a_link_inside_the_root_is_followed(served: Served, root: Path, other_model: Path) -> None:
    tensors = weights_of(other_model)
    (root / "blobs").mkdir()
    (root / "snapshot").mkdir()
    save_file(tensors, root / "blobs" / "abc")
    (root / "snapshot" / "model.safetensors").symlink_to(root / "blobs" / "abc")

    assert (await publish(served, from_directory(tensors, "snapshot"))).state == weights_pb2.UPDATE_STATE_APPLIED


@pytest.mark.parametrize("path", ["/etc", "../root", "run/../../root", ".."])
async def test_a_path_that_may_lead_out_is_denied(served: Served, other_model: Path, path: str) -> None:
    with refused(DENIED):
        await publish(served, from_directory(weights_of(other_model), path))


@pytest.mark.parametrize("linked", ["folder", "file"])
async def test_a_link_out_of_the_root_is_denied(served: Served, root: Path, other_model: Path, linked: str) -> None:
    if linked == "folder":
        (root / "out").symlink_to(other_model)
    else:
        (root / "out").mkdir()
        (root / "out" / "model.safetensors").symlink_to(other_model / "model.safetensors")

    with refused(DENIED):
        await publish(served, from_directory(weights_of(other_model), "out"))
    assert await unchanged(served)


@pytest.mark.parametrize("path", ["", "nowhere", "a\0b", "model.safetensors", "n" * 300])
async def test_a_path_that_is_no_directory_is_refused(served: Served, root: Path, other_model: Path, path: str) -> None:
    shutil.copy(other_model / "model.safetensors", root)

    with refused(INVALID, "begin.directory.path"):
        await publish(served, from_directory(weights_of(other_model), path))


async def test_a_chunk_beside_a_directory_is_refused(served: Served, root: Path, other_model: Path) -> None:
    tensors = weights_of(other_model)
    save_file(tensors, root / "model.safetensors")
    stream = from_directory(tensors, ".")
    stream.chunks = chunks_of(tensors)[:1]

    with refused(INVALID, "chunk"):
        await publish(served, stream)


async def test_a_manifest_without_digests_is_refused(served: Served, root: Path, other_model: Path) -> None:
    tensors = weights_of(other_model)
    save_file(tensors, root / "model.safetensors")
    stream = from_directory(tensors, ".")
    stream.manifests = [manifest_of(tensors)]

    with refused(INVALID, "manifest.tensors[0].xxh3_64"):
        await publish(served, stream)


async def test_a_tensor_in_no_file_or_in_two_is_refused(served: Served, root: Path, other_model: Path) -> None:
    tensors = weights_of(other_model)
    first = next(iter(tensors))
    save_file({name: tensor for name, tensor in tensors.items() if name != first}, root / "a.safetensors")

    with refused(INVALID, "begin.directory.path"):
        await publish(served, from_directory(tensors, "."))
    save_file(tensors, root / "b.safetensors")
    with refused(INVALID, "begin.directory.path"):
        await publish(served, from_directory(tensors, "."))


@pytest.mark.parametrize("change", ["dtype", "shape"])
async def test_a_file_that_disagrees_with_the_manifest_is_refused(
    served: Served, root: Path, other_model: Path, change: str
) -> None:
    tensors = weights_of(other_model)
    name = next(name for name, tensor in tensors.items() if tensor.dim() == 2)
    other = tensors[name].bfloat16() if change == "dtype" else tensors[name].T.contiguous().reshape(-1)
    save_file({**tensors, name: other}, root / "model.safetensors")

    with refused(INVALID, "begin.directory.path"):
        await publish(served, from_directory(tensors, "."))
    assert await unchanged(served)


@pytest.mark.parametrize("damage", ["flipped bit", "cut short", "no header", "empty", "header of another"])
async def test_damaged_files_are_data_loss(served: Served, root: Path, other_model: Path, damage: str) -> None:
    tensors = weights_of(other_model)
    file = root / "model.safetensors"
    save_file(tensors, file)
    content = bytearray(file.read_bytes())
    if damage == "flipped bit":
        content[-7] ^= 1
    elif damage == "cut short":
        del content[-100:]
    elif damage == "no header":
        content[:8] = b"\xff" * 8
    elif damage == "empty":
        content.clear()
    else:
        content[8:10] = b"[]"
    file.write_bytes(content)

    with refused(DATA_LOSS):
        await publish(served, from_directory(tensors, "."))
    assert await unchanged(served)
