"""WeightsService: the writer's side of the contract. A stream is begin, manifest…, chunk…, commit."""

from __future__ import annotations

import asyncio
import hashlib
import traceback
import uuid
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import grpc

from policy_server import metrics
from policy_server.directory import fill_from_directory, resolve_below
from policy_server.engine.protocol import Engine, InFlight, ModelDescription, WeightsVersion
from policy_server.engine.versions import check_swap
from policy_server.manifest import ManifestReader, require_equal_ties
from policy_server.readiness import Readiness
from policy_server.service import Context, wire_version
from policy_server.updates import Opening, PartStream, Update, UpdateBook, UpdateState
from policy_server.validation import MAX_RUN_ID_BYTES, POLICY, Violations, model_name, weights_version
from rlhf import tracing
from rlhf.failures import RpcFailure, aborted, failed_precondition, invalid_argument, not_found, too_large, unavailable
from rlhf.logs import get_logger
from rlhf.weights.v1 import weights_pb2, weights_pb2_grpc

MAX_PARTS = 64
MAX_UPDATE_ID_BYTES = 256
_READ_OUT_SECONDS = 5.0
_READ_OUT_BYTES = 256 << 20

_IN_FLIGHT = {
    weights_pb2.IN_FLIGHT_UNSPECIFIED: InFlight.RECOMPUTE,
    weights_pb2.IN_FLIGHT_RECOMPUTE: InFlight.RECOMPUTE,
    weights_pb2.IN_FLIGHT_KEEP_CACHE: InFlight.KEEP_CACHE,
    weights_pb2.IN_FLIGHT_WAIT: InFlight.WAIT,
    weights_pb2.IN_FLIGHT_ABORT: InFlight.ABORT,
}
_STATES = {
    UpdateState.STAGING: weights_pb2.UPDATE_STATE_STAGING,
    UpdateState.APPLIED: weights_pb2.UPDATE_STATE_APPLIED,
    UpdateState.FAILED: weights_pb2.UPDATE_STATE_FAILED,
}

_log = get_logger(__name__)


class WeightsService(weights_pb2_grpc.WeightsServiceServicer):
    """UpdateWeights and GetWeights of the policy; the engine swaps, this decides whether it may."""

    def __init__(
        self,
        engine: Engine,
        *,
        readiness: Readiness,
        weights_root: Path | None,
        max_staging_bytes: int,
        keep_staging: bool = True,
    ) -> None:
        self._engine = engine
        self._readiness = readiness
        self._weights_root = weights_root
        self._max_staging_bytes = max_staging_bytes
        self._updates = UpdateBook(keep_staging=keep_staging)
        self._instance_id = uuid.uuid4().hex
        metrics.show_live_weights(self._live())

    async def UpdateWeights(  # noqa: N802 - the contract's name
        self, request_iterator: AsyncIterator[weights_pb2.UpdateWeightsRequest], context: Context
    ) -> weights_pb2.UpdateWeightsResponse:
        """Stage one part of an update; the last part's commit verifies and swaps."""
        messages = aiter(request_iterator)
        try:
            answer = await self._update(messages)
        except RpcFailure:
            await _read_out(messages)
            raise
        await _read_out(messages)
        return answer

    async def GetWeights(  # noqa: N802
        self, request: weights_pb2.GetWeightsRequest, context: Context
    ) -> weights_pb2.GetWeightsResponse:
        """What is live, and what became of an update."""
        live = self._describe(request.model, "model").weights
        self._settle(request.update_id)
        update = self._updates.find(request.update_id)
        return weights_pb2.GetWeightsResponse(
            live=wire_version(live),
            state=_STATES[update.state] if update is not None else weights_pb2.UPDATE_STATE_UNSPECIFIED,
            in_place=False,
            max_parts=MAX_PARTS,
            max_staging_bytes=self._max_staging_bytes,
            features=["directory"] if self._weights_root is not None else [],
            server_instance_id=self._instance_id,
        )

    async def _update(
        self, messages: AsyncIterator[weights_pb2.UpdateWeightsRequest]
    ) -> weights_pb2.UpdateWeightsResponse:
        opening = await self._begin(messages)
        tracing.annotate(version=opening.version.version)
        self._settle(opening.update_id)
        former = self._updates.find(opening.update_id)
        if former is None or former.state is not UpdateState.APPLIED:
            check_swap(opening.version, self._live(), opening.if_current)
        stream = PartStream(opening.part)
        update = self._updates.enter(opening, stream)
        try:
            await self._receive(update, opening, stream, messages)
        finally:
            self._updates.leave(update, stream)
        if update.swap is not None:
            await self._follow(update, update.swap)
        elif update.state is UpdateState.FAILED:
            raise unavailable("this update failed while a part that it had was sent again: send all of it again")
        return weights_pb2.UpdateWeightsResponse(state=_STATES[update.state], live=wire_version(self._live()))

    async def _begin(self, messages: AsyncIterator[weights_pb2.UpdateWeightsRequest]) -> Opening:
        first = await anext(messages, None)
        kind = None if first is None else first.WhichOneof("message")
        if first is None or kind != "begin":
            field = "message" if first is not None and kind is None else "begin"
            raise invalid_argument(field, "the first message of a stream must be begin")
        return await self._check_begin(first.begin)

    async def _check_begin(self, begin: weights_pb2.Begin) -> Opening:
        if not begin.adapter_config_json:
            self._describe(begin.model, "begin.model")
        violations = Violations()
        violations.check(
            1 <= len(begin.update_id.encode()) <= MAX_UPDATE_ID_BYTES,
            "begin.update_id",
            f"must hold from 1 to {MAX_UPDATE_ID_BYTES} bytes",
        )
        violations.check(
            1 <= len(begin.weights.run_id.encode()) <= MAX_RUN_ID_BYTES,
            "begin.weights.run_id",
            f"must hold from 1 to {MAX_RUN_ID_BYTES} bytes",
        )
        violations.check(
            not begin.partial or begin.HasField("if_current"), "begin.if_current", "required for a partial update"
        )
        violations.check(begin.in_flight in _IN_FLIGHT, "begin.in_flight", f"{begin.in_flight} is unknown here")
        violations.check(not begin.format, "begin.format", "this server takes the model's own format only")
        violations.check(not begin.adapter_config_json, "begin.adapter_config_json", "this server takes no adapters")
        source = begin.WhichOneof("source")
        violations.check(source is not None, "begin.source", "one that this server knows is required")
        part_count = begin.stream.part_count if begin.stream.HasField("part_count") else 1
        violations.check(1 <= part_count <= MAX_PARTS, "begin.stream.part_count", f"must be from 1 to {MAX_PARTS}")
        violations.check(
            begin.stream.part < max(part_count, 1), "begin.stream.part", f"must be below part_count = {part_count}"
        )
        violations.raise_if_any()
        folder = None
        if source == "directory":
            # Shared storage may take its time to say what is there.
            folder = await asyncio.to_thread(resolve_below, self._weights_root, begin.directory.path)
        if begin.total_bytes > self._max_staging_bytes:
            raise too_large(
                f"{begin.total_bytes} bytes are more than the {self._max_staging_bytes} this server stages at most"
            )
        if model_name(begin.model) != POLICY:
            raise failed_precondition("FROZEN_MODEL", f"{begin.model!r} takes no weights")
        return Opening(
            update_id=begin.update_id,
            version=weights_version(begin.weights),
            if_current=weights_version(begin.if_current) if begin.HasField("if_current") else None,
            partial=begin.partial,
            in_flight=_IN_FLIGHT[begin.in_flight],
            total_bytes=begin.total_bytes,
            folder=folder,
            part=begin.stream.part,
            part_count=part_count,
            content=_content(begin),
        )

    async def _receive(
        self,
        update: Update,
        opening: Opening,
        stream: PartStream,
        messages: AsyncIterator[weights_pb2.UpdateWeightsRequest],
    ) -> None:
        """Read a stream to its commit, or as far as it takes to know that all of it was here before."""
        manifest = ManifestReader(self._engine.parameters(), with_digests=opening.folder is not None)
        complete = False
        async for message in messages:
            _require_current(stream)
            kind = message.WhichOneof("message")
            if kind == "manifest":
                if complete:
                    raise invalid_argument("manifest", "must come before the first chunk")
                manifest.add(message.manifest)
                continue
            if kind not in ("chunk", "commit"):
                raise invalid_argument(kind or "message", "expected a manifest, a chunk or commit")
            if not manifest.begun:
                raise invalid_argument(kind, "must come after a manifest")
            if not complete:
                update.adopt(manifest.finish(partial=opening.partial, total_bytes=opening.total_bytes))
                complete = True
            if update.has(opening.part):
                return
            if kind == "commit":
                self._commit(update, opening.part)
                return
            if opening.folder is not None:
                raise invalid_argument("chunk", "an update from a directory has no chunks")
            assert update.staging is not None
            update.staging.write(message.chunk, opening.part)
        _require_current(stream)
        raise invalid_argument("commit", "the stream ended without one: nothing of it is kept")

    def _commit(self, update: Update, part: int) -> None:
        self._updates.store(update, part)
        if not update.whole:
            return
        update.swap = asyncio.create_task(self._swap(update))
        # The outcome is in the book even when no caller is left to hear of it.
        update.swap.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def _swap(self, update: Update) -> None:
        try:
            await self._load(update)
        except BaseException as error:
            _release_locals(error)
            self._updates.end(update, UpdateState.FAILED)
            _log.warning("weights refused", update_id=update.opening.update_id, why=str(error) or type(error).__name__)
            raise
        self._applied(update)

    async def _load(self, update: Update) -> None:
        opening, staging = update.opening, update.staging
        assert staging is not None
        if opening.folder is not None and self._weights_root is not None:
            await asyncio.to_thread(fill_from_directory, staging, self._weights_root, opening.folder)
        else:
            staging.require_complete()
        require_equal_ties(self._engine.parameters(), staging.tensors)
        await self._engine.load_weights(
            staging.tensors, opening.version, if_current=opening.if_current, in_flight=opening.in_flight
        )

    async def _follow(self, update: Update, swap: asyncio.Task[None]) -> None:
        """Wait for the swap; a caller that goes away takes it along as long as nothing has been swapped."""
        try:
            await asyncio.shield(swap)
        except asyncio.CancelledError:
            if swap.cancelled():
                raise unavailable("the call that was to apply this update went away") from None
            update.called_off = swap.cancel()
            raise

    def _applied(self, update: Update) -> None:
        self._updates.end(update, UpdateState.APPLIED)
        metrics.show_live_weights(update.opening.version)
        self._readiness.arrived()
        version = update.opening.version
        _log.info("weights live", run_id=version.run_id, incarnation=version.incarnation, version=version.version)

    def _settle(self, update_id: str) -> None:
        """A swap whose caller went away may have been past the point where it could be called off."""
        update = self._updates.find(update_id)
        if update is None or update.state is not UpdateState.FAILED or not update.called_off:
            return
        if update.opening.version == self._live():
            self._applied(update)

    def _describe(self, model: str, field: str) -> ModelDescription:
        try:
            return self._engine.describe(model_name(model))
        except RpcFailure as failure:
            if failure.code is not grpc.StatusCode.NOT_FOUND:
                raise
            raise not_found(field, f"model {model[:64]!r}") from failure

    def _live(self) -> WeightsVersion:
        return self._engine.describe(POLICY).weights


def _require_current(stream: PartStream) -> None:
    if stream.replaced:
        raise aborted("UPDATE_IN_PROGRESS", f"another stream sends part {stream.part} of this update now")


def _release_locals(error: BaseException | None) -> None:
    """Let go of the staged tensors, which the frames of a traceback hold for as long as its error is around."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


async def _read_out(messages: AsyncIterator[weights_pb2.UpdateWeightsRequest]) -> None:
    """Read what a writer still sends, for a while, before it is answered.

    Python's gRPC client reports INTERNAL instead of the answer when that comes while it is sending.
    """
    size = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(_READ_OUT_SECONDS):
            async for message in messages:
                size += len(message.chunk.data)
                if size > _READ_OUT_BYTES:
                    return


def _content(begin: weights_pb2.Begin) -> bytes:
    """Digest of everything in a begin that all streams of an update have in common."""
    common = weights_pb2.Begin()
    common.CopyFrom(begin)
    if common.WhichOneof("source") == "stream":
        common.stream.part = 0
    return hashlib.sha256(common.SerializeToString(deterministic=True)).digest()
