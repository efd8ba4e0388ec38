"""Builds the parts of a policy server from its settings and runs them."""

from __future__ import annotations

import errno
import logging
import math
import socket
import time
from functools import partial

import torch
import transformers

from policy_server import metrics
from policy_server.engine.batch import POLICY, BatchEngine
from policy_server.engine.loading import LoadedModels, load_models
from policy_server.engine.protocol import Engine
from policy_server.engine.transformers_engine import TransformersEngine
from policy_server.metrics import MetricsObserver
from policy_server.prompts import PromptEncoder
from policy_server.readiness import Readiness
from policy_server.service import Announcement, PolicyService
from policy_server.settings import PolicySettings
from policy_server.weights_service import WeightsService
from rlhf.fingerprints import tokenizer_digest
from rlhf.logs import get_logger
from rlhf.memory import keep_freed_memory
from rlhf.policy.v1 import policy_pb2_grpc
from rlhf.server import BindError, Server
from rlhf.weights.v1 import weights_pb2_grpc

POLICY_SERVICE = "rlhf.policy.v1.PolicyService"
WEIGHTS_SERVICE = "rlhf.weights.v1.WeightsService"

_KEPT_BYTES = 2**30

_log = get_logger(__name__)


class ModelError(Exception):
    """A model that the settings name cannot be loaded; the message says why."""


async def serve(settings: PolicySettings) -> None:
    """Load, serve until SIGTERM or SIGINT, drain. Raises ModelError, BindError, CredentialsError."""
    _require_free(settings.listen)
    keep_freed_memory(_KEPT_BYTES, of_any_size=False)
    server = Server.of("policy", settings)
    engine = await add_services(server, settings)
    try:
        await server.start()
        await server.run_until_signalled()
    finally:
        await engine.stop(finish_within=0.0)  # whatever could finish has finished in the server's grace


async def add_services(server: Server, settings: PolicySettings) -> Engine:
    """Load the models, start an engine over them, and put both services on `server`; returns the running engine.

    Raises ModelError.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    began = time.perf_counter()
    models, engine = _load(settings)
    await engine.start()
    metrics.QUEUE_LIMIT_REQUESTS.set(settings.max_queue_requests)
    metrics.CACHE_LIMIT_BYTES.set(engine.cache_limit_bytes)
    _log.info(
        "loaded",
        model=settings.model,
        seconds=round(time.perf_counter() - began, 1),
        cache_bytes=int(engine.cache_limit_bytes),
        max_cached_tokens=engine.describe(POLICY).max_cached_tokens,
    )

    server.register(POLICY_SERVICE, serving=False)
    server.register(WEIGHTS_SERVICE, serving=True)
    readiness = Readiness(
        partial(server.set_serving, POLICY_SERVICE),
        waiting_for="a trainer to publish its weights (UpdateWeights)" if settings.managed else None,
    )
    policy_service = PolicyService(
        engine,
        PromptEncoder(models.tokenizer, max_waiting=settings.max_queue_requests),
        announcement=Announcement(
            tokenizer_digest=tokenizer_digest(models.tokenizer),
            max_message_bytes=settings.max_message_bytes,
            default_max_new_tokens=settings.default_max_new_tokens,
        ),
        readiness=readiness,
    )
    weights_service = WeightsService(
        engine,
        readiness=readiness,
        weights_root=settings.weights_root,
        max_staging_bytes=settings.max_staging_bytes
        or sum(math.prod(parameter.shape) * 4 for parameter in engine.parameters()),
        keep_staging=settings.keep_staging,
    )
    policy_pb2_grpc.add_PolicyServiceServicer_to_server(policy_service, server.grpc)  # type: ignore[no-untyped-call]
    weights_pb2_grpc.add_WeightsServiceServicer_to_server(weights_service, server.grpc)  # type: ignore[no-untyped-call]
    return engine


def _require_free(listen: str) -> None:
    """Raise BindError when another process listens there: before minutes of loading, not after them."""
    host, _, port = listen.rpartition(":")
    if listen.startswith("unix:") or not port.isdigit():
        return
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host.strip("[]"), int(port)), family=family).close()
    except OSError as error:  # whatever else is wrong with it, the server says when it binds
        if error.errno == errno.EADDRINUSE:
            raise BindError(f"policy can't listen on {listen}: another process does") from error


def _load(settings: PolicySettings) -> tuple[LoadedModels, BatchEngine]:
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.WARNING)  # it has a handler of its own
    try:
        models = load_models(
            settings.model,
            settings.reference,
            dtype=getattr(torch, settings.dtype),
            device=settings.device,
            reproducible=settings.reproducible,
        )
        engine = _new_engine(settings, models)
    except (OSError, ValueError, RuntimeError) as error:  # what transformers and torch raise for what can't be had
        raise ModelError(f"cannot load the model: {error}") from error
    return models, engine


def _new_engine(settings: PolicySettings, models: LoadedModels) -> BatchEngine:
    if settings.engine == "transformers":
        return TransformersEngine(
            models,
            max_batch_rows=settings.max_batch_rows,
            max_queue_requests=settings.max_queue_requests,
            max_context_tokens=settings.max_context_tokens,
            score_tokens=settings.score_tokens,
            observer=MetricsObserver(),
        )
    return BatchEngine(
        models,
        max_batch_rows=settings.max_batch_rows,
        max_queue_requests=settings.max_queue_requests,
        max_context_tokens=settings.max_context_tokens,
        cache_bytes=settings.cache_bytes,
        prefill_tokens=settings.prefill_tokens,
        score_tokens=settings.score_tokens,
        reproducible=settings.reproducible,
        pack_weights=settings.pack_weights,
        observer=MetricsObserver(),
    )
