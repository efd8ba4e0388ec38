"""The engine's thread: it alone touches the models, and does one thing after another.

A round is: what callers ask for, a swap if one is due, rows that join, one token for every running row, one
micro-batch of scores, one matrix to pack after a swap. So nothing starves, and a cancellation or a swap waits for one
decode step at most.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from policy_server.engine.admission import QueueLimit, RowChooser, WaitingGenerations
from policy_server.engine.budget import Budget, translated
from policy_server.engine.detokenize import TokenDecoder
from policy_server.engine.generation import Generation, Row
from policy_server.engine.jobs import ScoringJob, SwapJob
from policy_server.engine.linears import PackedLinears
from policy_server.engine.mailbox import Mailbox, Outbox
from policy_server.engine.model import ServedModel
from policy_server.engine.observer import EngineObserver, Phase
from policy_server.engine.protocol import InFlight
from policy_server.engine.runner import Runner
from policy_server.engine.sampling import draw
from policy_server.engine.scoring import Scorer
from policy_server.engine.versions import check_precondition, check_swap
from policy_server.engine.weights import ParameterTable
from rlhf import failures
from rlhf.failures import RpcFailure

_log = logging.getLogger(__name__)


class EngineWorker:
    """State and rounds of the engine's thread. All methods but `run` are tasks: they run between two rounds."""

    def __init__(
        self,
        *,
        policy: ServedModel,
        runner: Runner,
        parameters: ParameterTable,
        linears: PackedLinears | None,
        scorers: Mapping[str, Scorer],
        decoder: TokenDecoder,
        budget: Budget,
        reproducible: bool,
        queue: QueueLimit,
        observer: EngineObserver,
        mailbox: Mailbox,
        outbox: Outbox,
    ) -> None:
        self._policy = policy
        self._runner = runner
        self._parameters = parameters
        self._linears = linears
        self._scorers = scorers
        self._decoder = decoder
        self._budget = budget
        self._reproducible = reproducible
        self._queue = queue
        self._observer = observer
        self._mailbox = mailbox
        self._outbox = outbox
        self._chooser = RowChooser(budget, one_request_per_batch=reproducible)
        self._open: dict[int, Generation] = {}  # by id
        self._waiting = WaitingGenerations()
        self._resuming: list[Row] = []
        self._scorings: deque[ScoringJob] = deque()
        self._swaps: deque[SwapJob] = deque()
        self._stop_at: float | None = None

    # Tasks

    def submit(self, generation: Generation) -> None:
        """Take in a request whose place in the queue is already counted."""
        try:
            check_precondition(generation.request.weights, generation.model.version)
        except RpcFailure as failure:
            self._queue.leave()
            self._end(generation, failure)
            return
        self._open[id(generation)] = generation
        self._waiting.add(generation)

    def cancel(self, generation: Generation, failure: RpcFailure | None = None) -> None:
        """Free everything a request holds; `failure` is for a caller who still listens."""
        if id(generation) in self._open:
            self._observer.cancelled(completions=generation.unfinished)
            self._end(generation, failure)

    def cancel_named(self, request_id: str) -> None:
        """Free what every request of that name holds; whoever still listens gets ABORTED."""
        for generation in list(self._open.values()):
            if generation.request.request_id == request_id:
                self.cancel(generation, failures.unavailable("the request was cancelled by the server"))

    def score(self, job: ScoringJob) -> None:
        """Take in a scoring request whose place in the queue is already counted."""
        try:
            check_precondition(job.request.weights, job.model.version)
        except RpcFailure as failure:
            self._queue.leave()
            self._outbox.resolve(job.future, failure)
            return
        self._scorings.append(job)

    def swap(self, job: SwapJob) -> None:
        """Take in new weights; swaps happen in the order in which they came."""
        self._swaps.append(job)

    def stop(self, finish_within: float) -> None:
        """Leave when nothing is left to do, or after `finish_within` seconds."""
        self._stop_at = time.monotonic() + finish_within

    # The thread

    def run(self, threads: int) -> None:
        """Work until stopped; what goes wrong in a round fails those it was for, never the thread."""
        torch.set_num_threads(threads)  # OpenMP counts per thread that starts parallel work
        with torch.inference_mode():
            while not self._stopping():
                try:
                    self._round()
                except Exception as error:
                    _log.exception("The engine failed in a round")
                    self._fail_everything(translated(error))
                self._outbox.flush()
            self._fail_everything(failures.unavailable("the server is stopping"))
            self._outbox.flush()

    def _stopping(self) -> bool:
        return self._stop_at is not None and (not self._busy() or time.monotonic() >= self._stop_at)

    def _busy(self) -> bool:
        return bool(self._runner.rows or self._resuming or self._waiting or self._scorings or self._swaps)

    def _packs(self) -> bool:
        return self._linears is not None and self._linears.stale

    def _round(self) -> None:
        for task in self._mailbox.take(wait=not (self._busy() or self._packs()) and self._stop_at is None):
            task()
        self._prune()
        self._swap_if_due()
        self._admit()
        self._runner.step(self)
        self._prune()
        self._score_one()
        self._pack_one()
        self._show_load()

    # Generation

    def _admit(self) -> None:
        if not (self._resuming or self._waiting):
            return
        running = self._runner.rows
        rows = self._chooser.resuming(self._resuming, running=running)
        if not rows:
            rows = self._chooser.waiting(
                self._waiting,
                self._make_row,
                running=running,
                # A swap that waits for what runs lets nothing new start.
                started_only=bool(self._swaps) and self._swaps[0].in_flight is InFlight.WAIT,
            )
            for row in rows:
                if row.index == 0:
                    self._queue.leave()
        self._waiting.drop_done()
        for row in rows:
            if not row.live:
                self._deliver(row)
        rows = [row for row in rows if row.live]
        if rows:
            self._runner.start(rows, self)

    def _make_row(self, generation: Generation) -> Row | None:
        """The next completion's row; None = it can't be made, which ends the request."""
        try:
            return Row(generation, generation.admitted, self._decoder)
        except Exception as error:
            _log.exception("A completion could not be begun")
            self._end(generation, translated(error))
            return None

    # What the runner tells

    def sample(self, rows: Sequence[Row], logits: Tensor) -> list[int]:
        """Draw a token for every row that wants one, and deliver what is due; see `RowOwner.sample`."""
        if self._reproducible:
            logits = logits.cpu()  # a sum over the vocabulary has no deterministic CUDA kernel
        drawn = draw(logits, [row.draw() for row in rows])
        for index, row in enumerate(rows):
            if not row.live:
                continue
            if not drawn.valid[index]:
                self._end(row.generation, failures.internal("the model's logits are not finite"))
                continue
            row.accept(drawn.token_ids[index], drawn.raw_logprobs[index], drawn.processed_logprobs[index])
            self._deliver(row)
        return drawn.token_ids

    def prefilled(self, tokens: int) -> None:
        """Prompts were read."""
        self._observer.tokens(Phase.PREFILL, tokens)

    def decoded(self, rows: int, *, seconds: float) -> None:
        """A batch got one token for each row."""
        self._observer.decode_step(seconds=seconds, rows=rows)
        self._observer.tokens(Phase.DECODE, rows)
        self._outbox.flush()

    def fail_rows(self, rows: Sequence[Row], error: Exception) -> None:
        """A forward for these rows failed."""
        _log.error("A forward for %d completions failed", len(rows), exc_info=error)
        failure = self._budget.failure(error, completions=len({*rows, *self._runner.rows}))
        for row in rows:
            self._end(row.generation, failure)

    def _deliver(self, row: Row) -> None:
        delta = row.take_delta()
        if delta is None:
            return
        generation = row.generation
        self._outbox.put(partial(generation.deliver, delta))
        if delta.finish_reason is not None:
            self._observer.finished(delta.finish_reason)
            generation.unfinished -= 1
            if generation.unfinished == 0:
                self._end(generation, None)

    def _prune(self) -> None:
        self._runner.drop_dead_rows()
        self._resuming = [row for row in self._resuming if row.live]
        self._waiting.drop_done()
        for job in [each for each in self._scorings if each.cancelled]:
            self._leave_scoring(job)

    # Scores

    def _score_one(self) -> None:
        if not self._scorings:
            return
        job = self._scorings[0]
        batch = job.plan[job.finished]
        sequences = [job.request.sequences[place] for place in batch.sequences]
        lengths = [len(prompt) + len(completion) for prompt, completion in sequences]
        try:
            job.scores.update(self._scorers[job.model.name].score(job.request, batch))
        except Exception as error:
            _log.exception("A scoring micro-batch failed")
            failure = self._budget.failure(
                error,
                completions=len(self._runner.rows),
                scored=len(lengths),
                scored_tokens=len(lengths) * max(lengths),
            )
            self._leave_scoring(job, failure)
            return
        self._observer.tokens(Phase.SCORE, sum(lengths))
        job.finished += 1
        if job.finished == len(job.plan):
            self._outbox.resolve(job.future, job.result())
            self._leave_scoring(job)

    def _leave_scoring(self, job: ScoringJob, failure: RpcFailure | None = None) -> None:
        self._scorings.remove(job)
        self._queue.leave()
        if failure is not None:
            self._outbox.resolve(job.future, failure)

    # Swaps

    def _swap_if_due(self) -> None:
        while self._swaps:
            job = self._swaps[0]
            if job.in_flight is InFlight.WAIT and self._policy_runs() and not job.cancelled:
                return
            self._swaps.popleft()
            if not job.cancelled:
                self._swap(job)

    def _policy_runs(self) -> bool:
        return any(generation.admitted for generation in self._open.values() if generation.model is self._policy)

    def _swap(self, job: SwapJob) -> None:
        started = time.perf_counter()
        try:
            check_swap(job.version, self._policy.version, job.if_current)
            self._parameters.load(job.tensors)
            if self._linears is not None:
                self._linears.drop(job.tensors)
        except Exception as error:
            if not isinstance(error, RpcFailure):
                _log.exception("Weights could not be copied")
            self._outbox.resolve(job.future, translated(error))
            return
        self._policy.version = job.version
        self._after_swap(job.in_flight)
        self._observer.swapped(job.in_flight, seconds=time.perf_counter() - started)
        self._outbox.resolve(job.future, job.version)

    def _after_swap(self, in_flight: InFlight) -> None:
        rows = [row for row in [*self._runner.rows, *self._resuming] if row.model is self._policy]
        if in_flight is InFlight.RECOMPUTE:
            self._resuming += self._runner.forget(self._policy)
        elif in_flight is InFlight.ABORT:
            self._abort(rows)
        for generation in list(self._open.values()):
            if generation.model is self._policy:
                self._recheck(generation, [row for row in rows if row.generation is generation and row.live])
        self._prune()
        for job in [each for each in self._scorings if each.model is self._policy]:
            try:
                check_precondition(job.request.weights, self._policy.version)
            except RpcFailure as failure:
                self._leave_scoring(job, failure)
            job.restart()

    def _recheck(self, generation: Generation, rows: Sequence[Row]) -> None:
        """End what the new weights may not go on with: by its tokens as they are, or by the failure if it has none."""
        try:
            check_precondition(generation.request.weights, self._policy.version)
        except RpcFailure as failure:
            if not generation.sampled:
                self._end(generation, failure)
                return
            unmade = []
            while generation.waiting and (row := self._make_row(generation)) is not None:
                unmade.append(row)
                generation.admitted += 1
            self._abort([*rows, *unmade])

    def _abort(self, rows: Sequence[Row]) -> None:
        for row in rows:
            row.abort()
            self._deliver(row)

    def _pack_one(self) -> None:
        if self._linears is None or not self._linears.stale:
            return
        try:
            self._linears.pack_one()
        except (MemoryError, RuntimeError):  # torch's allocator raises RuntimeError
            _log.exception("No memory for a copy of a weight: its layers decode with the weight itself")

    # Ends

    def _end(self, generation: Generation, failure: RpcFailure | None) -> None:
        """End a request's stream; its rows are dropped at the next prune."""
        if generation.closed:
            return
        if id(generation) in self._open and generation.admitted == 0:
            self._queue.leave()
        generation.closed = True
        self._open.pop(id(generation), None)
        self._outbox.put(partial(generation.deliver, failure))

    def _fail_everything(self, failure: RpcFailure) -> None:
        for task in self._mailbox.take(wait=False):
            task()
        for generation in list(self._open.values()):
            self._end(generation, failure)
        for job in list(self._scorings):
            self._leave_scoring(job, failure)
        for swap in self._swaps:
            self._outbox.resolve(swap.future, failure)
        self._swaps.clear()
        self._runner.clear()
        self._resuming.clear()
        self._waiting.drop_done()
        self._show_load()

    def _show_load(self) -> None:
        generations = sum(generation.admitted == 0 for generation in self._waiting)
        self._observer.queued(generations=generations, scorings=len(self._scorings))
        self._observer.running(rows=len(self._runner.rows), cache_bytes=self._runner.cache_bytes)
