"""The engine that the service uses: batches of rows on one thread, asked and answered from the event loop."""

from __future__ import annotations

import asyncio
import copy
import itertools
import logging
import threading
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from policy_server.engine.admission import QueueLimit
from policy_server.engine.budget import Budget
from policy_server.engine.detokenize import TokenDecoder
from policy_server.engine.generation import Generation
from policy_server.engine.jobs import ScoringJob, SwapJob
from policy_server.engine.linears import PackedLinears, can_pack
from policy_server.engine.loading import LoadedModels
from policy_server.engine.mailbox import Mailbox, Outbox
from policy_server.engine.memory import free_bytes
from policy_server.engine.model import ServedModel
from policy_server.engine.observer import EngineObserver, SilentObserver
from policy_server.engine.protocol import (
    Engine,
    GenerationRequest,
    InFlight,
    ModelDescription,
    ParameterSpec,
    Scores,
    ScoringRequest,
    WeightsVersion,
)
from policy_server.engine.runner import CohortRunner, Runner
from policy_server.engine.scoring import Scorer, plan
from policy_server.engine.streams import DeltaStream, StreamItems
from policy_server.engine.weights import ParameterTable
from policy_server.engine.worker import EngineWorker
from rlhf import failures

POLICY, REFERENCE = "policy", "reference"

_CACHE_SHARE = 0.5  # of free memory; forwards and scores need the rest
_LEAST_CONTEXT = 2  # a token of prompt and one of completion

_log = logging.getLogger(__name__)


class BatchEngine(Engine):
    """An `Engine` (see protocol.py) over transformers models.

    max_batch_rows: completions that decode at once. max_queue_requests: requests (of either kind) that may wait for
    their first forward. max_context_tokens: prompt and completion, bounded by the model's own limit (None = that).
    cache_bytes: memory for the key-value caches of all that runs (None = half of what is free now, an update of the
    weights set aside); a context that it doesn't hold is not accepted, and completions wait for room in it.
    prefill_tokens: padded tokens of prompts that are read between two decode steps. score_tokens: of one scoring
    micro-batch, and of the prompts that are read together. reproducible: rows of different
    requests never share a batch (load the models with the same setting). pack_weights: on a CPU in float32, keep the
    policy's linear weights a second time, in the order that is fastest to decode with. shortcuts: where it is right,
    our own attention, activations and decode step in the place of the architecture's.

    Raises ValueError where cache_bytes doesn't hold max_context_tokens, or not a single completion.
    """

    def __init__(
        self,
        models: LoadedModels,
        *,
        max_batch_rows: int = 64,
        max_queue_requests: int = 1024,
        max_context_tokens: int | None = None,
        cache_bytes: float | None = None,
        prefill_tokens: int = 2048,
        score_tokens: int = 8192,
        reproducible: bool = False,
        pack_weights: bool = True,
        shortcuts: bool = True,
        observer: EngineObserver | None = None,
    ) -> None:
        self._parameters = ParameterTable(models.policy)
        self._linears: PackedLinears | None = None
        if pack_weights and not reproducible and can_pack(models.policy):
            self._linears = PackedLinears(models.policy)
        self._models = {
            POLICY: ServedModel(
                POLICY,
                models.policy,
                weights_digest=models.policy_digest,
                max_context_tokens=max_context_tokens,
                reproducible=reproducible or not shortcuts,
            ),
            REFERENCE: ServedModel(
                REFERENCE,
                models.reference,
                weights_digest=models.reference_digest,
                max_context_tokens=max_context_tokens,
                reproducible=reproducible or not shortcuts,
            ),
        }
        # The service encodes on the event loop with the original, at the same time.
        self._decoder = TokenDecoder(copy.deepcopy(models.tokenizer))
        self._scorers = {name: Scorer(model) for name, model in self._models.items()}
        self._prefill_tokens = prefill_tokens
        self._reproducible = reproducible
        if cache_bytes is None:
            update = sum(parameter.numel() for parameter in models.policy.parameters()) * torch.float32.itemsize
            cache_bytes = max(free_bytes(models.policy.device) - update, 0) * _CACHE_SHARE
        for model in self._models.values():
            _fit_context(model, cache_bytes, wanted=max_context_tokens)
        self._budget = Budget(max_batch_rows, score_tokens, fixed=reproducible, cache_bytes=cache_bytes)
        self._queue = QueueLimit(max_queue_requests)
        self._observer = observer or SilentObserver()
        self._mailbox = Mailbox()
        self._arrivals = itertools.count()
        self._worker: EngineWorker | None = None
        self._thread: threading.Thread | None = None
        self._accepting = False

    async def start(self) -> None:
        """Start the engine's thread; results come to the running event loop."""
        self._worker = EngineWorker(
            policy=self._models[POLICY],
            runner=self._new_runner(),
            parameters=self._parameters,
            linears=self._linears,
            scorers=self._scorers,
            decoder=self._decoder,
            budget=self._budget,
            reproducible=self._reproducible,
            queue=self._queue,
            observer=self._observer,
            mailbox=self._mailbox,
            outbox=Outbox(asyncio.get_running_loop()),
        )
        # A daemon: a forward that never returns must not keep a process alive that was told to end.
        self._thread = threading.Thread(
            target=self._worker.run, args=(torch.get_num_threads(),), name="engine", daemon=True
        )
        self._thread.start()
        self._accepting = True

    async def stop(self, *, finish_within: float) -> None:
        """Let what was accepted finish for at most `finish_within` seconds, then end the rest as unavailable."""
        self._accepting = False
        if self._worker is None or self._thread is None:
            return
        self._mailbox.put(partial(self._worker.stop, finish_within))
        await asyncio.to_thread(self._thread.join)

    def submit(self, request: GenerationRequest) -> DeltaStream:
        """Queue a request; see `Engine.submit`."""
        worker = self._accepting_worker()
        model = self._model(request.model)
        self._queue.enter()
        items: StreamItems = asyncio.Queue()
        generation = Generation(request, model, next(self._arrivals), items.put_nowait)
        self._mailbox.put(partial(worker.submit, generation))
        return DeltaStream(items, partial(self._mailbox.put, partial(worker.cancel, generation)))

    def cancel(self, request_id: str) -> None:
        """Free the rows of a request within one decode step; unknown ids are ignored."""
        if self._worker is not None:
            self._mailbox.put(partial(self._worker.cancel_named, request_id))

    async def log_probs(self, request: ScoringRequest) -> Scores:
        """Score given tokens; see `Engine.log_probs`. A cancelled caller's micro-batches are not run."""
        worker = self._accepting_worker()
        model = self._model(request.model)
        self._queue.enter()
        batches = plan(request, max_tokens=self._budget.tokens, one_by_one=self._reproducible)
        job = ScoringJob(request, model, batches, asyncio.get_running_loop().create_future())
        self._mailbox.put(partial(worker.score, job))
        try:
            return await job.future
        finally:
            job.cancelled = True

    async def load_weights(
        self,
        tensors: Mapping[str, Tensor],
        version: WeightsVersion,
        *,
        if_current: WeightsVersion | None,
        in_flight: InFlight,
    ) -> WeightsVersion:
        """Swap weights in between two decode steps; see `Engine.load_weights`. A cancelled caller's swap is dropped."""
        worker = self._accepting_worker()
        future: asyncio.Future[WeightsVersion] = asyncio.get_running_loop().create_future()
        job = SwapJob(tensors, version, if_current, in_flight, future)
        self._mailbox.put(partial(worker.swap, job))
        try:
            return await job.future
        finally:
            job.cancelled = True

    def parameters(self) -> Sequence[ParameterSpec]:
        """Every parameter of the policy, tied ones included."""
        return self._parameters.specs

    def describe(self, model: str) -> ModelDescription:
        """Describe "policy" or "reference"; raises not_found for another name."""
        served = self._model(model)
        return ModelDescription(
            model=served.name,
            weights=served.version,
            weights_digest=served.weights_digest,
            serving_dtype=str(served.dtype).removeprefix("torch."),
            vocab_size=served.vocab_size,
            eos_token_ids=served.eos_token_ids,
            max_context_tokens=served.max_context_tokens,
            max_running_completions=self._budget.rows,
            max_cached_tokens=self._max_cached_tokens(served),
        )

    @property
    def cache_limit_bytes(self) -> float:
        """Memory that key-value caches may hold."""
        return self._budget.cache_bytes

    def _max_cached_tokens(self, model: ServedModel) -> int:
        return model.cached_tokens(self._budget.cache_bytes)

    def _new_runner(self) -> Runner:
        return CohortRunner(prefill_tokens=self._prefill_tokens, reproducible=self._reproducible)

    def _model(self, name: str) -> ServedModel:
        try:
            return self._models[name or POLICY]
        except KeyError:
            raise failures.not_found("model", f"model {name[:64]!r}") from None

    def _accepting_worker(self) -> EngineWorker:
        if self._worker is None or not self._accepting:
            raise failures.unavailable("the engine is not running")
        return self._worker


def _fit_context(model: ServedModel, memory: float, *, wanted: int | None) -> None:
    """Lower max_context_tokens to what the memory for caches holds; raises ValueError if that is less than `wanted`."""
    most = model.cached_tokens(memory, rows=1)
    if most >= model.max_context_tokens:
        return
    has = f"the key-value cache has {memory:,.0f} bytes, which hold {most} tokens of a completion of the {model.name}"
    if most < _LEAST_CONTEXT:
        raise ValueError(f"{has}: give it more memory, or serve a smaller model")
    if wanted is not None:
        raise ValueError(f"{has}, and max_context_tokens is {wanted}")
    _log.warning("%s: max_context_tokens is %d, not %d", has, most, model.max_context_tokens)
    model.max_context_tokens = most
