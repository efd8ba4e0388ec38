"""A policy server inside the test's own process, over a real socket and with the real engine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
import xxhash
from prometheus_client import CollectorRegistry
from safetensors.torch import load_file
from torch import Tensor

from policy_server.assembly import add_services
from policy_server.engine.protocol import Engine
from policy_server.settings import PolicySettings
from rlhf.channel import open_channel
from rlhf.failures import RpcFailure, from_rpc_error
from rlhf.policy.v1 import policy_pb2, policy_pb2_grpc
from rlhf.server import Server
from rlhf.weights.v1 import weights_pb2, weights_pb2_grpc

RUN = "run-a"


@dataclass
class Served:
    """A running server and stubs on a channel to it."""

    server: Server
    engine: Engine
    channel: grpc.aio.Channel
    policy: policy_pb2_grpc.PolicyServiceStub
    weights: weights_pb2_grpc.WeightsServiceStub


@asynccontextmanager
async def serving(model: Path, **settings: Any) -> AsyncIterator[Served]:
    """Serve `model` on a port the OS picks; `settings` are PolicySettings."""
    resolved = PolicySettings(
        model=str(model), listen="127.0.0.1:0", metrics_port=0, drain_seconds=0, grace_seconds=0.2, **settings
    )
    server = Server(
        "policy",
        listen=resolved.listen,
        metrics_port=0,
        max_message_bytes=resolved.max_message_bytes,
        drain_seconds=resolved.drain_seconds,
        grace_seconds=resolved.grace_seconds,
        registry=CollectorRegistry(),
    )
    engine = await add_services(server, resolved)
    await server.start()
    try:
        async with open_channel(server.address) as channel:
            yield Served(
                server,
                engine,
                channel,
                policy_pb2_grpc.PolicyServiceStub(channel),
                weights_pb2_grpc.WeightsServiceStub(channel),
            )
    finally:
        await server.stop()
        await engine.stop(finish_within=0)


class Refused:
    """What `refused` caught."""

    failure: RpcFailure


class refused:  # noqa: N801 - reads as a phrase: with refused(code, field)
    """Expects an RPC inside the block to fail with a code and, where given, a field path and a reason."""

    def __init__(self, code: grpc.StatusCode, field: str = "", reason: str = "") -> None:
        self._expected = (code, field, reason)

    def __enter__(self) -> Refused:
        self._caught = Refused()
        return self._caught

    def __exit__(self, kind: object, error: object, traceback: object) -> bool:
        if error is None:
            pytest.fail(f"expected {self._expected}, but the call succeeded")
        if not isinstance(error, grpc.RpcError):
            return False
        failure = self._caught.failure = from_rpc_error(error)
        code, field, reason = self._expected
        fields = [violation.field for violation in failure.violations]
        assert failure.code is code, failure
        assert not field or field in fields, failure
        assert not reason or failure.reason == reason, failure
        assert failure.message
        return True


def tokens(*ids: int) -> policy_pb2.Prompt:
    """A prompt of token ids."""
    return policy_pb2.Prompt(token_ids=policy_pb2.TokenIds(ids=ids))


def generate(prompt: policy_pb2.Prompt | None = None, **fields: Any) -> policy_pb2.GenerateRequest:
    """A request for a short completion; `fields` are GenerateRequest's, then SamplingParams'."""
    own = policy_pb2.GenerateRequest.DESCRIPTOR.fields_by_name
    sampling = {"max_new_tokens": 8, "seed": 1, **{name: fields[name] for name in fields if name not in own}}
    request = {name: value for name, value in fields.items() if name in own}
    return policy_pb2.GenerateRequest(
        prompt=prompt if prompt is not None else tokens(40, 41, 42),
        sampling=policy_pb2.SamplingParams(**sampling),
        **request,
    )


def version(number: int, *, run: str = RUN, incarnation: int = 1) -> policy_pb2.WeightsVersion:
    """A published version."""
    return policy_pb2.WeightsVersion(run_id=run, incarnation=incarnation, version=number)


DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}


def raw(tensor: Tensor) -> bytes:
    """Little-endian bytes."""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def weights_of(folder: Path) -> dict[str, Tensor]:
    """Parameters by name, as saved."""
    return dict(load_file(folder / "model.safetensors"))


@dataclass
class Stream:
    """The messages of one UpdateWeights stream, to be spoiled by a test before it is sent."""

    begin: weights_pb2.Begin
    manifests: list[weights_pb2.Manifest]
    chunks: list[weights_pb2.Chunk]
    commit: bool = True

    def messages(self) -> Iterator[weights_pb2.UpdateWeightsRequest]:
        yield weights_pb2.UpdateWeightsRequest(begin=self.begin)
        for manifest in self.manifests:
            yield weights_pb2.UpdateWeightsRequest(manifest=manifest)
        for chunk in self.chunks:
            yield weights_pb2.UpdateWeightsRequest(chunk=chunk)
        if self.commit:
            yield weights_pb2.UpdateWeightsRequest(commit=weights_pb2.Commit())


def manifest_of(tensors: dict[str, Tensor], *, digests: bool = False) -> weights_pb2.Manifest:
    return weights_pb2.Manifest(
        tensors=[
            weights_pb2.TensorSpec(
                name=name,
                dtype=DTYPES[tensor.dtype],
                shape=tensor.shape,
                xxh3_64=xxhash.xxh3_64_intdigest(raw(tensor)) if digests else None,
            )
            for name, tensor in tensors.items()
        ]
    )


def chunks_of(tensors: dict[str, Tensor], *, size: int = 4096) -> list[weights_pb2.Chunk]:
    return [
        chunk(index, offset, content[offset : offset + size])
        for index, content in enumerate(map(raw, tensors.values()))
        for offset in range(0, len(content), size)
    ]


def chunk(tensor: int, offset: int, data: bytes) -> weights_pb2.Chunk:
    return weights_pb2.Chunk(tensor=tensor, offset=offset, data=data, xxh3_64=xxhash.xxh3_64_intdigest(data))


def update(
    tensors: dict[str, Tensor],
    weights: policy_pb2.WeightsVersion,
    *,
    update_id: str | None = None,
    part: int = 0,
    parts: int = 1,
    **begin: Any,
) -> Stream:
    """One part of a whole and right update; parts take turns with the chunks."""
    own_id = f"{weights.run_id}/{weights.incarnation}/{weights.version}" if update_id is None else update_id
    return Stream(
        weights_pb2.Begin(
            update_id=own_id,
            weights=weights,
            stream=weights_pb2.StreamSource(part=part, part_count=parts if parts > 1 else None),
            total_bytes=sum(tensor.nbytes for tensor in tensors.values()),
            **begin,
        ),
        [manifest_of(tensors)],
        chunks_of(tensors)[part::parts],
    )


async def publish(served: Served, stream: Stream | Iterable[weights_pb2.UpdateWeightsRequest]) -> Any:
    """Send a stream and return the answer."""
    messages = stream.messages() if isinstance(stream, Stream) else stream
    return await served.weights.UpdateWeights(iter(messages), timeout=30)


async def greedy(served: Served, ids: Sequence[int] = (40, 41, 42), **fields: Any) -> list[int]:
    """Tokens of a greedy completion: a fingerprint of the live weights."""
    answer = await served.policy.Generate(generate(tokens(*ids), temperature=0.0, **fields), timeout=30)
    return list(answer.completions[0].token_ids)
