"""WeightPublisher: brings one policy server to the trainer's weights, and back to them when it was restarted."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from torch import Tensor

from rlhf.channel import RetryPolicy, call_metadata, call_with_retry, open_channel, wait_until_ready
from rlhf.failures import RpcFailure, from_rpc_error, unavailable
from rlhf.logs import get_logger
from rlhf.security.config import ClientSecurity
from rlhf.tensors import dtype_name, iter_pieces
from rlhf.weights.v1 import weights_pb2, weights_pb2_grpc
from trainer.clients.waits import CallWatch, watched
from trainer.clients.weight_files import written
from trainer.versions import WeightsVersion

_log = get_logger(__name__)

WEIGHTS_SERVICE = "rlhf.weights.v1.WeightsService"

# A manifest message may hold 1 MiB; a tensor's line is far below 1 KiB.
_TENSORS_PER_MANIFEST = 512
_CONFLICTS = 10
_UNEXPLAINED = 10
_MOVED_ON = frozenset({"STALE_VERSION", "CURRENT_MISMATCH", "OTHER_RUN"})


class PublishError(RuntimeError):
    """The server holds weights that this trainer must not replace, or can't take these; the message says which."""


class TakenOverError(PublishError):
    """Another trainer has the server, or this run."""


@dataclass(frozen=True)
class WeightsInfo:
    """What GetWeights tells of a server."""

    live: WeightsVersion
    reads_folders: bool
    in_place: bool
    """Updates are not staged beside the live weights: one that fails leaves the server without any."""
    max_staging_bytes: int
    """Largest update; 0 = not known beforehand."""


@dataclass(frozen=True)
class _Published:
    tensors: tuple[tuple[str, Tensor], ...]
    weights: WeightsVersion
    frozen: Collection[str]

    def beyond(self, live: WeightsVersion) -> tuple[tuple[str, Tensor], ...]:
        """What a server that holds `live` lacks: all, unless this trainer brought it there."""
        if (live.run_id, live.incarnation) != (self.weights.run_id, self.weights.incarnation):
            return self.tensors
        return tuple((name, tensor) for name, tensor in self.tensors if name not in self.frozen)


class WeightPublisher:
    """Publishes to one server by UpdateWeights and remembers what that server must hold.

    The tensors of the last `publish` are kept by reference, for `ensure`; nothing may change them while a call runs.
    """

    def __init__(
        self,
        target: str,
        *,
        timeout: float = 600.0,
        retry: RetryPolicy | None = None,
        on_new_server: Callable[[], Awaitable[None]] | None = None,
        watch: CallWatch | None = None,
        metadata: Sequence[tuple[str, str]] = (),
        shared_folder: Path | None = None,
        security: ClientSecurity | None = None,
    ) -> None:
        """`timeout` (seconds) bounds a stream; `on_new_server` runs before weights go to a process not seen before.

        shared_folder: where the server's --weights-root is seen here. Weights go through a file there, if the server
        reads any, else in the stream.
        """
        self.target = target
        self._timeout = timeout
        self._retry = retry or RetryPolicy()
        self._on_new_server = on_new_server
        self._watch = watch
        self._metadata = tuple(metadata) or call_metadata()
        self._shared_folder = shared_folder
        self._channel = open_channel(target, security=security)
        self._stub: Any = weights_pb2_grpc.WeightsServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._published: _Published | None = None
        self._instance: str | None = None
        self._writer = uuid.uuid4().hex
        self._unexplained = 0
        self._one_at_a_time = asyncio.Lock()

    async def wait_ready(self, within: float | None = None) -> None:
        """Until the server's health says that WeightsService can stage; TimeoutError after `within` seconds."""
        with watched(self._watch) as on_wait:
            await wait_until_ready(
                self._channel,
                WEIGHTS_SERVICE,
                what="policy server",
                target=self.target,
                timeout=within,
                on_wait=on_wait,
            )

    async def get_weights(self) -> WeightsInfo:
        """What is live and what the server takes; nothing changes."""

        async def attempt() -> weights_pb2.GetWeightsResponse:
            return await self._ask("")

        with watched(self._watch) as on_wait:
            answer = await call_with_retry(
                attempt, policy=self._retry, what="policy server", target=self.target, on_wait=on_wait
            )
        return WeightsInfo(
            live=WeightsVersion.from_proto(answer.live),
            reads_folders="directory" in answer.features,
            in_place=answer.in_place,
            max_staging_bytes=answer.max_staging_bytes,
        )

    async def finds(self, folder: str) -> bool | None:
        """Whether the server finds a folder of the shared one; None when its answer does not tell.

        Asked by an update that is above any max_staging_bytes, so it is refused before it begins. Only for servers that
        state theirs and are not `in_place`.
        """
        begin = weights_pb2.Begin(
            update_id=f"finds/{folder}",
            weights=WeightsVersion("finds", 1, 0).to_proto(),
            total_bytes=2**64 - 1,
            directory=weights_pb2.DirectorySource(path=folder),
        )
        try:
            await self._update(_alone(begin))
        except RpcFailure as failure:
            if failure.reason == "TOO_LARGE":
                return True
            if _is_unseen(failure):
                return False
        return None

    async def publish(
        self, tensors: Iterable[tuple[str, Tensor]], weights: WeightsVersion, *, frozen: Collection[str] = ()
    ) -> None:
        """Make `weights` live: names as in transformers' state dict, tied parameters once; returns when they serve.

        frozen: names of those that are the same in every version of this run and incarnation, and so are sent once to a
        server that keeps running.

        Raises PublishError when the server holds newer weights of this run, or these from another trainer, or can't
        take weights of these names and shapes, and RpcFailure for what else is final (room).
        """
        published = _Published(tuple((name, tensor.detach()) for name, tensor in tensors), weights, frozen)
        async with self._one_at_a_time:
            # From here on these are the weights that a restarted server must get, whatever becomes of this call.
            first, self._published = self._published is None, published
            await self._bring_live(published, may_take_over=first)

    async def ensure(self) -> None:
        """Publish the last weights again if the server lost them (it was restarted); otherwise one cheap question.

        Raises PublishError when another run's or newer weights are live: another trainer took the server over.
        """
        async with self._one_at_a_time:
            if self._published is not None:
                await self._bring_live(self._published, may_take_over=False)

    async def is_same_server(self) -> bool:
        """Whether the process that answers now is the one that was checked last. Raises RpcFailure when none does."""
        return (await self._ask("")).server_instance_id == self._instance

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()

    async def _bring_live(self, published: _Published, *, may_take_over: bool) -> None:
        """Ask what is live, send what is missing, and ask again after every failure, since an answer may be lost."""
        conflicts = 0

        async def attempt() -> None:
            nonlocal conflicts
            while True:
                state = await self._get_weights(published)
                if await self._is_live(published, state, may_take_over=may_take_over):
                    return
                if state.state == weights_pb2.UPDATE_STATE_STAGING:
                    # Our own stream was cut after its commit; the swap goes on without us.
                    raise unavailable("an update of this trainer is still being applied")
                try:
                    await self._send(published, state)
                    self._unexplained = 0
                    return
                except RpcFailure as failure:
                    self._raise_misfit(failure)
                    if failure.reason in ("UPDATE_IN_PROGRESS", "DATA_LOSS"):
                        raise unavailable(failure.message) from failure
                    if _is_cut_short(failure) and self._unexplained < _UNEXPLAINED:
                        self._unexplained += 1
                        raise unavailable(failure.message) from failure
                    if failure.reason not in _MOVED_ON or conflicts == _CONFLICTS:
                        raise
                    # The server moved between the question and the swap; asking again tells where to.
                    conflicts += 1

        with watched(self._watch) as on_wait:
            await call_with_retry(
                attempt, policy=self._retry, what="policy server", target=self.target, on_wait=on_wait
            )

    async def _get_weights(self, published: _Published) -> weights_pb2.GetWeightsResponse:
        """What is live, and the fate of this update on this process."""
        state = await self._ask(self._update_id(published.weights))
        if state.server_instance_id == self._instance:
            return state
        if self._instance is not None:
            _log.warning("the policy server was restarted", target=self.target)
        if self._on_new_server is not None:
            await self._on_new_server()
        self._instance = state.server_instance_id
        return await self._ask(self._update_id(published.weights))

    async def _ask(self, update_id: str) -> weights_pb2.GetWeightsResponse:
        try:
            answer: weights_pb2.GetWeightsResponse = await self._stub.GetWeights(
                weights_pb2.GetWeightsRequest(update_id=update_id), timeout=self._timeout, metadata=self._metadata
            )
            return answer
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error

    async def _is_live(
        self, published: _Published, state: weights_pb2.GetWeightsResponse, *, may_take_over: bool
    ) -> bool:
        live, ours = WeightsVersion.from_proto(state.live), published.weights
        if live == ours:
            if state.state == weights_pb2.UPDATE_STATE_APPLIED:
                return True
            # Two folders begin with the same incarnation: these may be other weights of the same name.
            raise TakenOverError(
                f"policy server {self.target} holds {live}, which this trainer did not publish: another trainer has "
                "the same run id and another folder, so this one stops; give it a run id of its own"
            )
        if live.is_after(ours):
            raise TakenOverError(
                f"policy server {self.target} holds {live}, this trainer has {ours}: another trainer of this run is "
                "newer, so this one stops"
            )
        if live.run_id not in ("", ours.run_id) and not may_take_over:
            raise TakenOverError(
                f"policy server {self.target} now holds {live}: another trainer took it over from run {ours.run_id}"
            )
        return False

    async def _send(self, published: _Published, state: weights_pb2.GetWeightsResponse) -> None:
        tensors = published.beyond(WeightsVersion.from_proto(state.live))
        begin = weights_pb2.Begin(
            update_id=self._update_id(published.weights),
            weights=published.weights.to_proto(),
            total_bytes=sum(tensor.nbytes for _, tensor in tensors),
            partial=len(tensors) < len(published.tensors),
        )
        if begin.partial or state.live.run_id != published.weights.run_id:
            begin.if_current.CopyFrom(state.live)
        folder = self._shared_folder
        if folder is not None and "directory" not in state.features:
            _log.warning("the policy server reads no folder, so weights go in the stream", target=self.target)
            folder = None
        if folder is None:
            begin.stream.SetInParent()
            answer = await self._update(_streamed(begin, tensors))
        else:
            owner = f"{published.weights.run_id} {self.target}"
            try:
                async with written(folder, owner, tensors) as files:
                    begin.directory.path = files.folder
                    answer = await self._update(_named(begin, tensors, files.digests))
            except OSError as error:
                raise PublishError(f"weights cannot be written to {folder}: {error}") from error
        if WeightsVersion.from_proto(answer.live) != published.weights:
            raise PublishError(
                f"policy server {self.target} answered that {WeightsVersion.from_proto(answer.live)} is live after "
                f"{published.weights} was published"
            )
        if state.live.run_id not in ("", published.weights.run_id):
            _log.warning(
                "took the policy server over from another run, whose trainer stops if it still lives",
                target=self.target,
                our_run=published.weights.run_id,
                their_run=state.live.run_id,
            )

    async def _update(
        self, messages: AsyncIterator[weights_pb2.UpdateWeightsRequest]
    ) -> weights_pb2.UpdateWeightsResponse:
        try:
            answer: weights_pb2.UpdateWeightsResponse = await self._stub.UpdateWeights(
                messages, timeout=self._timeout, metadata=self._metadata
            )
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        return answer

    def _raise_misfit(self, failure: RpcFailure) -> None:
        """Raise PublishError when the server can't take this model's weights, or not from there, however often."""
        if _is_unseen(failure):
            raise PublishError(
                f"policy server {self.target} does not find what this trainer writes to {self._shared_folder} "
                f"({failure.message}): --weights-folder must be the server's --weights-root as this process sees it; "
                "without --weights-folder, weights go in the stream"
            ) from failure
        if any(violation.field.startswith("manifest") for violation in failure.violations):
            raise PublishError(
                f"policy server {self.target} can't take the weights of this model ({failure.message}): start it with "
                "the trainer's --model"
            ) from failure

    def _update_id(self, weights: WeightsVersion) -> str:
        return f"{weights.run_id}/{weights.incarnation}/{weights.version}/{self._instance}/{self._writer}"


def _is_unseen(failure: RpcFailure) -> bool:
    """Whether the server says that a directory is not there, or not where it may read."""
    named = {violation.field for violation in failure.violations}
    return "begin.directory.path" in named or failure.code is grpc.StatusCode.PERMISSION_DENIED


def _is_cut_short(failure: RpcFailure) -> bool:
    """Whether gRPC made up this status for a server that answered while we were still sending.

    Its answer, which may be a passing one, is lost then. A server that means INTERNAL names the reason.
    """
    return failure.code is grpc.StatusCode.INTERNAL and not failure.reason


async def _alone(begin: weights_pb2.Begin) -> AsyncIterator[weights_pb2.UpdateWeightsRequest]:
    yield weights_pb2.UpdateWeightsRequest(begin=begin)


async def _streamed(
    begin: weights_pb2.Begin, tensors: Sequence[tuple[str, Tensor]]
) -> AsyncIterator[weights_pb2.UpdateWeightsRequest]:
    """begin, manifest…, chunk…, commit; the bytes are cut as gRPC asks for them, one tensor at a time in memory."""
    yield weights_pb2.UpdateWeightsRequest(begin=begin)
    for manifest in _manifests(tensors):
        yield weights_pb2.UpdateWeightsRequest(manifest=manifest)
    for index, (_, tensor) in enumerate(tensors):
        for piece in iter_pieces(tensor):
            # By a mapping the message is built in its place; a Chunk would be copied into it, five times as slow.
            chunk = {"tensor": index, "offset": piece.offset, "data": piece.data, "xxh3_64": piece.xxh3_64}
            yield weights_pb2.UpdateWeightsRequest(chunk=chunk)
    yield weights_pb2.UpdateWeightsRequest(commit=weights_pb2.Commit())


async def _named(
    begin: weights_pb2.Begin, tensors: Sequence[tuple[str, Tensor]], digests: Sequence[int]
) -> AsyncIterator[weights_pb2.UpdateWeightsRequest]:
    """begin, manifest…, commit; the bytes are in the folder that begin names."""
    yield weights_pb2.UpdateWeightsRequest(begin=begin)
    for manifest in _manifests(tensors, digests):
        yield weights_pb2.UpdateWeightsRequest(manifest=manifest)
    yield weights_pb2.UpdateWeightsRequest(commit=weights_pb2.Commit())


def _manifests(
    tensors: Sequence[tuple[str, Tensor]], digests: Sequence[int] | None = None
) -> Iterator[weights_pb2.Manifest]:
    specs = [
        weights_pb2.TensorSpec(
            name=name,
            dtype=dtype_name(tensor.dtype),
            shape=tensor.shape,
            xxh3_64=None if digests is None else digests[index],
        )
        for index, (name, tensor) in enumerate(tensors)
    ]
    for first in range(0, len(specs), _TENSORS_PER_MANIFEST):
        yield weights_pb2.Manifest(tensors=specs[first : first + _TENSORS_PER_MANIFEST])
