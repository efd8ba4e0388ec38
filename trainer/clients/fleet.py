"""PolicyFleet: one policy served by several servers, each addressed by itself.

Every replica has a keeper, a task that brings it the weights published last, again whenever it was away. A call goes to
the replica with the fewest in flight among those that hold the weights it needs; one that fails for a passing reason
goes to another at once. Tokens are a function of weights and request, so it does not matter which.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import grpc
from torch import Tensor

from rlhf import tracing
from rlhf.channel import OnWait, RetryPolicy, Waiting
from rlhf.failures import RpcFailure, is_transient, unavailable
from rlhf.logs import get_logger
from rlhf.security.config import ClientSecurity
from trainer.clients.discovery import Discovery
from trainer.clients.placing import Place, best_for, why_nobody_answers
from trainer.clients.policy import OTHER_WEIGHTS, Generation, ModelInfo, PolicyClient
from trainer.clients.publisher import TakenOverError, WeightPublisher
from trainer.clients.replica import Replica, ReplicaState
from trainer.clients.waits import CallWatch, watched
from trainer.metrics import TrainerMetrics
from trainer.versions import WeightsVersion

_log = get_logger(__name__)

T = TypeVar("T")

_REPORT_SECONDS = 1.0
_READY_SECONDS = 5.0
_RECHECK_SECONDS = 30.0
_RESOLVE_SECONDS = 10.0
_MISPLACED = 10


@dataclass(frozen=True)
class _Weights:
    tensors: Sequence[tuple[str, Tensor]]
    version: WeightsVersion
    frozen: Collection[str]
    trace: tracing.TraceContext | None


class PolicyFleet:
    """Calls on whichever replica can answer; they wait as long as none can, and say so.

    Raises RpcFailure for what is final, TakenOverError when another trainer took a replica over, and, once none is left
    that is not refused, what the last was refused for (what `check` raised, PublishError).
    """

    def __init__(
        self,
        discovery: Discovery,
        *,
        check: Callable[[PolicyClient], Awaitable[None]],
        watch: CallWatch,
        metrics: TrainerMetrics,
        concurrency: int,
        keep_copy: bool,
        timeout: float = 300.0,
        publish_timeout: float = 600.0,
        retry: RetryPolicy | None = None,
        metadata: Sequence[tuple[str, str]] = (),
        shared_folder: Path | None = None,
        security: ClientSecurity | None = None,
    ) -> None:
        """`check` raises for a server that is not one of this run; it runs before weights go to a new process.

        concurrency: Generate calls in flight, shared evenly by the replicas that answer. keep_copy: publish a copy of
        the tensors, so that they may change while a replica that was away still gets them. timeout, publish_timeout:
        seconds for each attempt of a call, and of a transfer of weights.
        """
        self._discovery = discovery
        self._check = check
        self._watch = watch
        self._metrics = metrics
        self._concurrency = concurrency
        self._keep_copy = keep_copy
        self._timeout = timeout
        self._publish_timeout = publish_timeout
        self._retry = retry or RetryPolicy()
        self._metadata = metadata
        self._shared_folder = shared_folder
        self._security = security or ClientSecurity()
        self._replicas: dict[str, Replica] = {}
        self._leaving: set[asyncio.Task[None]] = set()
        self._places: list[Place] = []
        self._weights: _Weights | None = None
        self._error: Exception | None = None
        self._news = asyncio.Event()
        self._finder: asyncio.Task[None] | None = None
        self._jitter = random.Random()

    @property
    def target(self) -> str:
        """All of them, for messages."""
        return str(self._discovery)

    @property
    def known(self) -> Collection[str]:
        """The targets of all replicas, whatever their state."""
        return self._replicas.keys()

    async def wait_ready(self, *, grace: float = 0.0) -> list[PolicyClient]:
        """Until a replica can take weights; the clients of all that can within `grace` seconds from then on.

        The others join when they come. A call on such a client fails at once if that server is gone again.
        """
        await self._find_first()
        began, attempt = time.monotonic(), 0
        with watched(self._watch) as on_wait:
            while not self._in(ReplicaState.USABLE):
                if self._error is not None:
                    raise self._error
                await self._change(_REPORT_SECONDS)
                attempt += 1
                self._say(on_wait, began, attempt)
        began = time.monotonic()
        while self._in(ReplicaState.AWAY) and (left := began + grace - time.monotonic()) > 0:
            await self._change(left)
        return [replica.client for replica in self._in(ReplicaState.USABLE)]

    async def publish(
        self, tensors: Iterable[tuple[str, Tensor]], weights: WeightsVersion, *, frozen: Collection[str] = ()
    ) -> None:
        """Make `weights` live (names as in transformers' state dict, tied parameters once) on every replica.

        Returns when they serve on one. The others get them meanwhile, or when they come back, and no call before.
        frozen: names of those that are the same in every version of this run and incarnation.
        """
        kept = [(name, tensor.detach()) for name, tensor in tensors]
        if self._keep_copy:
            # What stays the same needs no copy, unless reading it takes other ranks, which will be learning.
            still = {name for name, each in kept if name in frozen and isinstance(each, Tensor)}
            kept = await asyncio.to_thread(
                lambda: [(name, each if name in still else each.to("cpu", copy=True)) for name, each in kept]
            )
        self._weights = _Weights(kept, weights, frozen, tracing.here())
        for replica in self._replicas.values():
            replica.wanted.set()
        self._release(await self._taken(Place(weights, or_later=False, generates=False)), generates=False)

    async def generate(
        self,
        prompt_ids: Sequence[int],
        *,
        seed: int,
        max_new_tokens: int,
        temperature: float = 1.0,
        weights: WeightsVersion | None = None,
        or_later: bool = False,
        metadata: Sequence[tuple[str, str]] = (),
    ) -> list[Generation]:
        """As PolicyClient's, by a replica that holds the weights."""

        async def ask(replica: Replica) -> list[Generation]:
            return await replica.client.generate(
                prompt_ids,
                seed=seed,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                weights=weights,
                or_later=or_later,
                metadata=metadata,
            )

        return await self._somewhere(ask, needed=weights, or_later=or_later, generates=True)

    async def log_probs(
        self,
        model: str,
        sequences: Sequence[tuple[Sequence[int], Sequence[int]]],
        *,
        temperature: float = 1.0,
        weights: WeightsVersion | None = None,
        metadata: Sequence[tuple[str, str]] = (),
    ) -> list[list[float]]:
        """As PolicyClient's, by any replica that passed the check and holds the weights, if some are named."""

        async def ask(replica: Replica) -> list[list[float]]:
            rows = await replica.client.log_probs(
                model, sequences, temperature=temperature, weights=weights, metadata=metadata
            )
            # The answer names no process: one that was started again with another reference would have been believed.
            if not await replica.publisher.is_same_server():
                raise unavailable("the policy server was restarted meanwhile")
            return rows

        return await self._somewhere(ask, needed=weights)

    async def get_model(self, model: str = "") -> ModelInfo:
        """As PolicyClient's; what it tells of limits holds for all replicas, which are meant to be alike."""
        return await self._somewhere(lambda replica: replica.client.get_model(model))

    async def close(self) -> None:
        """End every call and close the channels."""
        if self._finder is not None:
            self._finder.cancel()
            await asyncio.gather(self._finder, return_exceptions=True)
        await asyncio.gather(*(replica.close() for replica in self._replicas.values()), *self._leaving)

    async def _somewhere(
        self,
        ask: Callable[[Replica], Awaitable[T]],
        *,
        needed: WeightsVersion | None = None,
        or_later: bool = False,
        generates: bool = False,
    ) -> T:
        """What a replica answers; whatever may pass is asked of the next."""
        misplaced = 0
        while True:
            replica = await self._taken(Place(needed, or_later, generates))
            try:
                answer = await ask(replica)
                replica.strikes = 0
                return answer
            except RpcFailure as failure:
                misplaced += failure.reason in OTHER_WEIGHTS
                if failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED and failure.retry_after is not None:
                    self._leave_alone(replica, failure, failure.retry_after)
                elif is_transient(failure) or (failure.reason in OTHER_WEIGHTS and misplaced < _MISPLACED):
                    self._lose(replica, str(failure))
                else:
                    raise
            finally:
                self._release(replica, generates=generates)

    async def _taken(self, place: Place) -> Replica:
        """A replica for this call, counted as in flight there; in the order in which calls came."""
        self._places.append(place)
        self._assign()
        began, attempt = time.monotonic(), 0
        try:
            with watched(self._watch) as on_wait:
                while not place.replica.done():
                    attempt += 1
                    self._say(on_wait, began, attempt)
                    await asyncio.wait([place.replica], timeout=_REPORT_SECONDS)
            return place.replica.result()
        except asyncio.CancelledError:
            if not place.replica.cancel() and place.replica.exception() is None:
                self._release(place.replica.result(), generates=place.generates)
            raise

    def _say(self, on_wait: OnWait | None, began: float, attempt: int) -> None:
        if on_wait is not None and (waiting := why_nobody_answers(self._replicas.values())):
            target, reason = waiting
            on_wait(Waiting("policy server", target, time.monotonic() - began, attempt, reason))

    def _release(self, replica: Replica, *, generates: bool) -> None:
        self._count(replica, -1, generates=generates)
        if replica.retired:
            self._close_if_idle(replica)
        self._assign()

    def _count(self, replica: Replica, calls: int, *, generates: bool) -> None:
        replica.in_flight += calls
        replica.generating += calls if generates else 0
        if not replica.retired:
            self._metrics.policy_calls.labels(replica=replica.target).set(replica.in_flight)

    def _assign(self) -> None:
        """Give the calls that wait, the first first, to the replicas that have room."""
        waiting = []
        for place in self._places:
            if place.replica.done():
                continue
            if self._error is not None:
                place.replica.set_exception(self._error)
            elif (replica := best_for(place, self._replicas.values(), self._concurrency)) is not None:
                self._count(replica, 1, generates=place.generates)
                place.replica.set_result(replica)
            else:
                waiting.append(place)
        self._places = waiting

    def _leave_alone(self, replica: Replica, failure: RpcFailure, seconds: float) -> None:
        if replica.is_full():
            return  # many calls hear the same
        replica.why = str(failure)
        replica.strikes += 1
        pause = max(seconds, self._backoff(replica.strikes)) * (1 + self._jitter.uniform(0, self._retry.jitter))
        replica.full_until = time.monotonic() + pause
        # A little later than that, so that the clock agrees.
        asyncio.get_running_loop().call_later(pause + 0.001, self._assign)

    def _lose(self, replica: Replica, why: str) -> None:
        """A call failed there: no more of them until its keeper has seen that it is well."""
        if replica.state is not ReplicaState.USABLE or replica.retired:
            return
        replica.strikes += 1
        self._set_aside(replica, ReplicaState.AWAY, why, pause=self._backoff(replica.strikes))
        self._changed()

    def _backoff(self, times: int) -> float:
        seconds = self._retry.initial * self._retry.multiplier ** min(times - 1, 32)
        return min(self._retry.maximum, seconds) * (1 + self._jitter.uniform(-self._retry.jitter, self._retry.jitter))

    async def _keep(self, replica: Replica) -> None:
        """Bring it the weights published last, as often as it may lack them; before there are any, wait for it."""
        failures = 0
        while True:
            await replica.wanted.wait()
            pause, replica.pause = replica.pause, 0.0
            await asyncio.sleep(pause)
            replica.wanted.clear()
            weights = self._weights
            try:
                if weights is None:
                    await replica.publisher.wait_ready(within=_REPORT_SECONDS)
                else:
                    with tracing.continuing(weights.trace):
                        await self._bring(replica, weights)
            except TakenOverError as error:
                self._error = error
            except Exception as error:
                failures += 1
                if isinstance(error, TimeoutError) or is_transient(error):
                    self._set_aside(replica, ReplicaState.AWAY, str(error), pause=self._backoff(failures))
                else:
                    self._set_aside(replica, ReplicaState.REFUSED, str(error), pause=_RECHECK_SECONDS)
                    if all(each.state is ReplicaState.REFUSED for each in self._replicas.values()):
                        self._error = error
            else:
                failures = 0
                holds = None if weights is None else weights.version
                if holds is not None and replica.state is not ReplicaState.USABLE and len(self._replicas) > 1:
                    _log.info("a policy server joined", target=replica.target, weights=str(holds))
                replica.state, replica.holds = ReplicaState.USABLE, holds
            self._changed()

    async def _bring(self, replica: Replica, weights: _Weights) -> None:
        await replica.publisher.publish(weights.tensors, weights.version, frozen=weights.frozen)
        await replica.client.wait_ready(within=_READY_SECONDS)
        if replica.holds is None:
            replica.room = (await replica.client.get_model()).max_running_completions

    def _set_aside(self, replica: Replica, state: ReplicaState, why: str, *, pause: float) -> None:
        if state is ReplicaState.REFUSED and why != replica.why:
            _log.warning("a policy server is left out", target=replica.target, reason=why)
        elif state is not replica.state and len(self._replicas) > 1:
            _log.warning("a policy server is away; the others go on", target=replica.target, reason=why)
        replica.state, replica.why, replica.holds, replica.pause = state, why, None, pause
        replica.wanted.set()

    def _in(self, state: ReplicaState) -> list[Replica]:
        return [replica for replica in self._replicas.values() if replica.state is state]

    def _changed(self) -> None:
        states = [replica.state for replica in self._replicas.values()]
        for state in ReplicaState:
            self._metrics.policy_replicas.labels(state=state.value).set(states.count(state))
        self._news.set()
        self._assign()

    async def _change(self, within: float) -> None:
        """Until a replica's state may have changed, or so many seconds have passed."""
        self._news.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._news.wait(), within)

    async def _find_first(self) -> None:
        with watched(self._watch) as on_wait:
            began, attempt = time.monotonic(), 0
            while not self._replicas:
                attempt += 1
                try:
                    self._set_members(await self._discovery.targets())
                except OSError as error:
                    if on_wait is not None:
                        seconds = time.monotonic() - began
                        on_wait(Waiting("policy server", self.target, seconds, attempt, str(error)))
                    await asyncio.sleep(min(_REPORT_SECONDS, self._backoff(attempt)))
        if self._discovery.changes and self._finder is None:
            self._finder = asyncio.create_task(self._look_again())

    async def _look_again(self) -> None:
        failing = False
        while True:
            await asyncio.sleep(_RESOLVE_SECONDS)
            try:
                self._set_members(await self._discovery.targets())
                failing = False
            except OSError as error:
                if not failing:
                    _log.warning("the policy servers' name has no address; those known go on", reason=str(error))
                failing = True

    def _set_members(self, targets: Sequence[str]) -> None:
        for target in [known for known in self._replicas if known not in targets]:
            replica = self._replicas.pop(target)
            _log.info("a policy server's address is gone", target=target)
            replica.retired = True
            self._metrics.policy_calls.remove(target)
            self._close_if_idle(replica)
        for target in targets:
            if target not in self._replicas:
                self._replicas[target] = self._replica(target)
        self._changed()

    def _close_if_idle(self, replica: Replica) -> None:
        if replica.in_flight == 0:
            closing = asyncio.create_task(replica.close())
            self._leaving.add(closing)
            closing.add_done_callback(self._leaving.discard)

    def _replica(self, target: str) -> Replica:
        # The fleet repeats what fails, elsewhere if it can.
        once = replace(self._retry, attempts=1)
        security = self._security.for_host(self._discovery.host_of(target))
        client = PolicyClient(
            target,
            timeout=self._timeout,
            retry=once,
            watch=_Silent(),
            metadata=self._metadata,
            security=security,
        )
        publisher = WeightPublisher(
            target,
            timeout=self._publish_timeout,
            retry=once,
            on_new_server=lambda: self._check(client),
            watch=_Silent(),
            metadata=self._metadata,
            shared_folder=self._shared_folder,
            security=security,
        )
        replica = Replica(target, client, publisher)
        replica.wanted.set()
        replica.keeper = asyncio.create_task(self._keep(replica))
        self._metrics.policy_calls.labels(replica=target).set(0)
        return replica


class _Silent:
    """A keeper's waits for one replica: a call that waits for all of them tells."""

    def waiting(self, call: object, waiting: Waiting) -> None:
        pass

    def over(self, call: object) -> None:
        pass
