"""The engine's rounds, one at a time, against a simple model of what its callers may expect of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from transformers import GPT2Config

from policy_server.engine import batch
from policy_server.engine.batch import BatchEngine
from policy_server.engine.cache import SPARE_COLUMNS
from policy_server.engine.generation import Row
from policy_server.engine.protocol import (
    FinishReason,
    GenerationRequest,
    InFlight,
    Priority,
    Scores,
    ScoringRequest,
    TokenDelta,
    WeightsPrecondition,
    WeightsVersion,
)
from policy_server.engine.streams import DeltaStream
from policy_server.engine.worker import EngineWorker
from rlhf.failures import RpcFailure
from tests.policy_server.engine.architectures import COMMON, loaded, model_from
from tests.policy_server.engine.harness import INITIAL, Gathered, request

ROWS = 4
QUEUE = 5
SCORE_TOKENS = 24
CACHE_TOKENS = ROWS * (18 + SPARE_COLUMNS)  # less than ROWS of the longest completions may come to take
CACHE_TOKEN_BYTES = 2 * 8 * 4  # keys and values of one layer, float32


class Stepped:
    """An engine that does a round when it is told to; its callers are on an event loop that runs in between."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        model = model_from(GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=64, **COMMON))
        self.engine = BatchEngine(
            loaded(model),
            max_batch_rows=ROWS,
            max_queue_requests=QUEUE,
            cache_bytes=CACHE_TOKENS * CACHE_TOKEN_BYTES,
            score_tokens=SCORE_TOKENS,
            pack_weights=False,
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(batch, "threading", SimpleNamespace(Thread=_ThreadThatRunsAtItsEnd))
            self._loop.run_until_complete(self.engine.start())
        assert self.engine._worker is not None
        self.worker: EngineWorker = self.engine._worker

    def call(self, coroutine: Any) -> asyncio.Task[Any]:
        """Begin a call; what it asks of the worker lies in the mailbox then."""
        task = self._loop.create_task(coroutine)
        self._let_callers_run()
        return task

    def cancel(self, task: asyncio.Task[Any]) -> None:
        task.cancel()
        self._let_callers_run()

    def round(self) -> None:
        self.engine._mailbox.put(lambda: None)  # it would wait for a task
        with torch.inference_mode():
            self.worker._round()
        self.worker._outbox.flush()
        self._let_callers_run()

    def stop(self, *, finish_within: float) -> None:
        self._loop.run_until_complete(self.engine.stop(finish_within=finish_within))
        self._let_callers_run()

    def close(self) -> None:
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()

    def _let_callers_run(self) -> None:
        for _ in range(3):  # a result, the task that awaits it, and what that does then
            self._loop.run_until_complete(asyncio.sleep(0))


class _ThreadThatRunsAtItsEnd:
    """Does nothing until it is joined."""

    def __init__(self, *, target: Callable[..., None], args: tuple[Any, ...], name: str, daemon: bool) -> None:
        self._run = lambda: target(*args)

    def start(self) -> None:
        pass

    def join(self) -> None:
        self._run()


@dataclass(eq=False)
class Asked:
    """A request as its caller sees it."""

    request: GenerationRequest
    arrival: int
    stream: DeltaStream
    completions: list[Gathered] = field(default_factory=list)
    ended: bool = False
    failure: RpcFailure | None = None
    closed: bool = False  # by its caller
    cancelled: bool = False  # by name

    def __post_init__(self) -> None:
        self.completions = [Gathered() for _ in range(self.request.sampling.n)]

    @property
    def begun(self) -> list[bool]:
        """Which completions have had a row: each gives a delta in the round in which it begins."""
        return [each.deltas > 0 for each in self.completions]

    @property
    def waits(self) -> bool:
        return not self.ended and not all(self.begun)

    @property
    def goes(self) -> tuple[int, int]:
        """Its place among those that wait."""
        return (self.request.priority, self.arrival)

    @property
    def tokens(self) -> list[int]:
        return [len(each.token_ids) for each in self.completions]

    def read(self) -> None:
        while not self.stream._items.empty():
            item = self.stream._items.get_nowait()
            assert not self.ended, "something came after the end"
            if isinstance(item, TokenDelta):
                self.completions[item.index].add(item)
            else:
                self.ended, self.failure = True, item
        if self.ended:
            self._check_end()

    def _check_end(self) -> None:
        reasons = [each.finish_reason for each in self.completions]
        if self.failure is not None:
            unavailable = self.failure.code is grpc.StatusCode.UNAVAILABLE
            assert unavailable or (self.request.weights.exact is not None and not any(self.tokens)), self.failure
        elif not self.closed:
            assert set(reasons) <= {FinishReason.LENGTH, FinishReason.ABORTED}
        for completion in self.completions:
            if completion.finish_reason is FinishReason.LENGTH:
                assert len(completion.token_ids) == self.request.sampling.max_new_tokens


@dataclass(eq=False)
class Swap:
    """Weights on their way."""

    version: WeightsVersion
    in_flight: InFlight
    task: asyncio.Task[WeightsVersion]
    settled: bool = False


@dataclass(eq=False)
class Scoring:
    """A request for scores."""

    request: ScoringRequest
    task: asyncio.Task[Scores]
    settled: bool = False


class SchedulerMachine(RuleBasedStateMachine):
    """Requests, scores and swaps come and are given up in any order; rounds go on in between."""

    asked = Bundle("asked")
    swapping = Bundle("swapping")
    scoring = Bundle("scoring")

    def __init__(self) -> None:
        super().__init__()
        self.stepped = Stepped()
        self.everyone: list[Asked] = []
        self.swaps: list[Swap] = []
        self.scorings: list[Scoring] = []
        self.live = INITIAL
        self.newest = 0
        self.applied: list[Swap] = []
        self.finish = True
        self.stopped = False

    @initialize(finish=st.booleans())
    def choose_the_end(self, finish: bool) -> None:
        """Whether what is left at the end may finish."""
        self.finish = finish

    # What callers do

    @rule(
        target=asked,
        n=st.integers(1, ROWS + 2),
        length=st.integers(1, 20),
        prompt=st.integers(1, 5),
        priority=st.sampled_from(Priority),
        exact=st.booleans(),
        model=st.sampled_from(["policy", "policy", "policy", "reference"]),
    )
    def submit(self, n: int, length: int, prompt: int, priority: Priority, exact: bool, model: str) -> Asked | None:
        wanted = request(
            range(prompt),
            name=f"{len(self.everyone)}",
            model=model,
            n=n,
            max_new_tokens=length,
            min_new_tokens=length,
            priority=priority,
            weights=WeightsPrecondition(exact=self.live) if exact else WeightsPrecondition(),
        )
        try:
            stream = self.stepped.engine.submit(wanted)
        except RpcFailure as failure:
            assert (failure.code, self.waiting) == (grpc.StatusCode.RESOURCE_EXHAUSTED, QUEUE)  # noqa: PT017
            return None
        assert self.waiting < QUEUE
        self.everyone.append(Asked(wanted, len(self.everyone), stream))
        return self.everyone[-1]

    @rule(asked=asked, by_name=st.booleans())
    def give_up(self, asked: Asked | None, by_name: bool) -> None:
        """At any time, more than once too."""
        if asked is None:
            return
        if by_name:
            asked.cancelled = True
            self.stepped.engine.cancel(asked.request.request_id)
        else:
            asked.closed = True
            self.stepped.call(asked.stream.aclose())

    @rule(target=scoring, sequences=st.integers(1, 6), exact=st.booleans())
    def score(self, sequences: int, exact: bool) -> Scoring | None:
        wanted = ScoringRequest(
            "score",
            "policy",
            [([1, 2], [3] * (1 + index)) for index in range(sequences)],
            weights=WeightsPrecondition(exact=self.live) if exact else WeightsPrecondition(),
        )
        full = self.waiting == QUEUE
        task = self.stepped.call(self.stepped.engine.log_probs(wanted))
        assert task.done() == full
        if full:
            failure = task.exception()
            assert isinstance(failure, RpcFailure)
            assert failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED
            return None
        self.scorings.append(Scoring(wanted, task))
        return self.scorings[-1]

    @rule(scoring=consumes(scoring))
    def give_up_scores(self, scoring: Scoring | None) -> None:
        if scoring is not None:
            self.stepped.cancel(scoring.task)

    @precondition(lambda self: any(not asked.ended for asked in self.everyone))
    @rule(target=swapping, in_flight=st.sampled_from(InFlight), stale=st.sampled_from([False, False, False, True]))
    def swap(self, in_flight: InFlight, stale: bool) -> Swap:
        self.newest += 0 if stale and self.newest else 1
        version = WeightsVersion("run", 1, self.newest)
        load = self.stepped.engine.load_weights({}, version, if_current=None, in_flight=in_flight)
        self.swaps.append(Swap(version, in_flight, self.stepped.call(load)))
        return self.swaps[-1]

    @rule(swapping=consumes(swapping))
    def give_up_swap(self, swapping: Swap) -> None:
        self.stepped.cancel(swapping.task)

    # What the engine does

    @rule(count=st.integers(1, 3))
    def rounds(self, count: int) -> None:
        for _ in range(count):
            self._round()

    def teardown(self) -> None:
        self._stop()
        self.stepped.close()

    # What must hold

    @property
    def waiting(self) -> int:
        """Requests that hold a place in the queue: of generations those that did not begin, of scores all."""
        generations = sum(not asked.ended and not any(asked.begun) for asked in self.everyone)
        return generations + sum(not scoring.settled for scoring in self.scorings)

    def _round(self) -> None:
        before = {asked: (asked.tokens, asked.begun) for asked in self.everyone if not asked.ended}
        rows_before = _names(self.stepped.worker._runner.rows)
        resuming = bool(self.stepped.worker._resuming)
        given_up = {asked for asked in before if asked.closed or asked.cancelled}
        versions = len(self.applied)
        self.stepped.round()
        self._read()
        came = {swap.in_flight for swap in self.applied[versions:]}

        assert all(asked.ended for asked in given_up), "a request that was given up goes on"
        open_names = {asked.request.request_id for asked in self.everyone if not asked.ended}
        rows = [*self.stepped.worker._runner.rows, *self.stepped.worker._resuming]
        assert len(rows) <= ROWS
        assert {row.generation.request.request_id for row in rows if row.live} <= open_names
        assert {each.request.request_id for each in self.stepped.worker._open.values()} == open_names
        assert self.stepped.engine._queue._waiting == self.waiting
        self._check_progress(before, rows_before)
        self._check_order(before, resuming=resuming or InFlight.RECOMPUTE in came)

    def _check_progress(self, before: dict[Asked, Any], rows: set[tuple[str, int]]) -> None:
        """Every row that was there has another token, or has ended, unless its cache has to be computed again first."""
        for name, index in rows - _names(self.stepped.worker._resuming):
            asked = self.everyone[int(name)]
            if not asked.ended and asked.completions[index].finish_reason is None:
                assert asked.tokens[index] > before[asked][0][index], "a running row stood still"

    def _check_order(self, before: dict[Asked, Any], *, resuming: bool) -> None:
        """Who begins comes before all who still wait, and no row stays free while somebody waits."""
        head = next((swap for swap in self.swaps if not swap.settled), None)
        drains = head is not None and head.in_flight is InFlight.WAIT
        began = [
            asked
            for asked, (tokens, begun) in before.items()
            if any(now and not was for was, now in zip(begun, _sampled(asked), strict=True))
        ]
        waiting = [asked for asked in before if asked.waits and not (drains and not any(before[asked][1]))]
        for asked in began:
            assert not drains or any(before[asked][1]), "a request began that has to wait for a swap"
            assert all(asked.goes <= other.goes for other in waiting), "a request was passed over"
        stepped = [
            asked
            for asked, (tokens, _) in before.items()
            for was, now in zip(tokens, asked.tokens, strict=True)
            if now > was
        ]
        assert len(stepped) <= 1 or _reserved(stepped) <= CACHE_TOKENS, "rows run that could outgrow the cache"
        if waiting and not began and not resuming:
            fits = _reserved([*stepped, min(waiting, key=lambda asked: asked.goes)]) <= CACHE_TOKENS
            assert len(stepped) == ROWS or not fits, "a row stayed free"

    def _read(self) -> None:
        lived = [self.live]  # since the last look: more than one only at the stop, which is many rounds
        for asked in self.everyone:
            asked.read()
        for swap in [each for each in self.swaps if each.task.done() and not each.settled]:
            earlier = self.swaps[: self.swaps.index(swap)]
            given_up = swap.task.cancelled()
            assert given_up or all(each.settled for each in earlier), "a swap overtook another"
            swap.settled = True
            if given_up:
                continue
            failure = swap.task.exception()
            if failure is None:
                assert swap.task.result() == swap.version > self.live
                self.live = swap.version
                lived.append(self.live)
                self.applied.append(swap)
            elif not self.stopped:
                assert isinstance(failure, RpcFailure)
                assert failure.code is grpc.StatusCode.ABORTED
                assert swap.version <= self.live
        assert self.stepped.engine.describe("policy").weights == self.live
        for scoring in [each for each in self.scorings if each.task.done() and not each.settled]:
            scoring.settled = True
            if scoring.task.cancelled():
                continue
            failure = scoring.task.exception()
            if failure is None:
                weights = scoring.task.result().weights
                assert weights in (lived if self.stopped else [self.live])
                assert scoring.request.weights.exact in (None, weights)
                assert [len(each) for each in scoring.task.result().logprobs] == [
                    len(completion) for _, completion in scoring.request.sequences
                ]
            elif not self.stopped:
                assert scoring.request.weights.exact not in (None, self.live)

    def _stop(self) -> None:
        self.stopped = True
        self.stepped.stop(finish_within=60 if self.finish else 0)
        self._read()
        assert all(asked.ended for asked in self.everyone)
        assert all(each.task.done() for each in [*self.swaps, *self.scorings])
        assert self.stepped.engine._queue._waiting == self.waiting == 0
        assert not self.stepped.worker._open
        if self.finish:
            for asked in self.everyone:
                assert asked.cancelled or asked.failure is None or asked.request.weights.exact is not None
        for asked in self.everyone:
            self._check_weights(asked)
        with pytest.raises(RpcFailure):
            self.stepped.engine.submit(request([1]))

    def _check_weights(self, asked: Asked) -> None:
        """Its tokens are of weights that it may have, and from one side of a swap that waits for it or aborts it."""
        of_each = [{span.weights for span in each.spans} for each in asked.completions]
        used = set().union(*of_each)
        if asked.request.model == "reference":
            assert used <= {INITIAL}
            return
        assert used <= {INITIAL, *(swap.version for swap in self.applied)}
        if asked.request.weights.exact is not None:
            assert used <= {asked.request.weights.exact}
        for swap in self.applied:
            if swap.in_flight is InFlight.WAIT:
                assert len({weights >= swap.version for weights in used}) <= 1, "a swap did not wait"
            elif swap.in_flight is InFlight.ABORT:
                for weights in of_each:
                    assert len({each >= swap.version for each in weights}) <= 1, "a completion was not aborted"


def _reserved(rows: list[Asked]) -> int:
    """Tokens of cache that rows may come to take: those of a model as much, each, as the longest."""
    total = 0
    for model in {asked.request.model for asked in rows}:
        wanted = [asked.request for asked in rows if asked.request.model == model]
        longest = max(len(each.prompt_token_ids) + each.sampling.max_new_tokens for each in wanted)
        total += len(wanted) * (longest + SPARE_COLUMNS)
    return total


def _names(rows: list[Row]) -> set[tuple[str, int]]:
    return {(row.generation.request.request_id, row.index) for row in rows}


def _sampled(asked: Asked) -> list[bool]:
    """Which completions have had a row that ran: one that is aborted while it waits has none."""
    return [each.deltas > 0 and bool(each.token_ids) for each in asked.completions]


def test_rounds_keep_what_callers_may_expect_whatever_they_ask_and_give_up() -> None:
    run_state_machine_as_test(
        SchedulerMachine, settings=settings(max_examples=60, stateful_step_count=40, database=None)
    )
