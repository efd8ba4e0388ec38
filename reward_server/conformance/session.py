"""One run of the kit against one server: makes samples, sends requests, and keeps every exchange."""

from __future__ import annotations

import asyncio
import hashlib
import time
import uuid
from collections.abc import Sequence
from typing import Any

import grpc

from reward_server.conformance.case import CASES, Broken, NotApplicable
from reward_server.conformance.exchange import Exchange, Headers, Mistake
from reward_server.conformance.material import Content, Material, token_ids
from reward_server.conformance.status import seconds_of
from reward_server.conformance.target import Target
from reward_server.conformance.wire import outcome_of, stub
from rlhf.reward.v1 import reward_pb2

_SURVEY_SAMPLES = 8
_UNIT_SAMPLES = 4
_DEFAULT_MAX_REQUEST_BYTES = 4 << 20
_SHORTEST_WAIT_SECONDS = 0.001
_AGAIN_SECONDS = 0.2


class Unreachable(Exception):  # noqa: N818 - a state of the server
    """Nothing can be judged; the message says why."""


class Patience:
    """How long something is waited for: `seconds` each time, and no more once that was in vain."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds


class Wait:
    """One wait, which begins when it is first slept in: what the first answer took says nothing of those to come."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._until: float | None = None

    async def sleep(self, seconds: float) -> bool:
        """Sleep `seconds`, or what is left of the patience; False = nothing was left."""
        now = time.monotonic()
        if self._until is None:
            self._until = now + self._patience.seconds
        left = self._until - now
        if left <= 0:
            self._patience.seconds = 0.0
            return False
        await asyncio.sleep(min(max(seconds, _SHORTEST_WAIT_SECONDS), left))
        return True


class Session:
    """Calls to the server under test, in a training run of their own.

    timeout: deadline of an ordinary call. patience: seconds to wait for PENDING samples, and for an overloaded server,
    from its first answer on.
    """

    def __init__(
        self, target: Target, *, material: Material, reward: str = "", timeout: float = 10.0, patience: float = 30.0
    ) -> None:
        self.channel = target.open_channel()
        self.headers = target.headers()
        # A name of its own, or a server that remembers would answer out of the last run.
        self.run_id = f"conformance-{uuid.uuid4().hex[:16]}"
        self.reward = reward
        self.timeout = timeout
        self.info = reward_pb2.GetRewardInfoResponse()
        self.described = False
        self.exchanges: list[Exchange] = []
        self.unresolved: Exchange | None = None
        """The last answer of a wait for PENDING samples that was in vain."""
        self._case_id = ""
        self._material = material
        self._for_pending = Patience(patience)
        self._for_overload = Patience(patience)
        self._samples_made = 0
        self._survey: asyncio.Task[tuple[list[reward_pb2.Sample], list[reward_pb2.SampleResult]]] | None = None

    async def __aenter__(self) -> Session:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()

    async def open(self) -> None:
        """Ask for the reward's description; Unreachable when the server gives none that a client could work with."""
        since = time.monotonic()
        while True:
            exchange = await self.describe(self.reward)
            if isinstance(exchange.response, reward_pb2.GetRewardInfoResponse):
                self.info, self.described = exchange.response, True
                return
            code, left = exchange.code, since + self.timeout - time.monotonic()
            if code is grpc.StatusCode.UNAVAILABLE and left > 0:
                await asyncio.sleep(min(_AGAIN_SECONDS, left))
            elif code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise Unreachable(f"no answer within {self.timeout:g} s: {exchange.status}")
            elif code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
                raise Unreachable(f"the server does not let us in: {exchange.status}")
            elif code is grpc.StatusCode.NOT_FOUND and self.reward:
                raise Unreachable(f"the server has no reward {self.reward!r}: {exchange.status}")
            else:
                return

    def turn_to(self, case_id: str) -> None:
        """What follows is done by this case."""
        self._case_id = case_id
        self._material.turn_to(case_id)

    @property
    def in_groups(self) -> bool:
        """Whether the reward compares the samples of a group."""
        return self.info.scope == reward_pb2.SCOPE_GROUP

    @property
    def remembers(self) -> bool:
        """Whether the server promises to remember final outcomes."""
        return seconds_of(self.info.remembers) > 0

    @property
    def max_request_bytes(self) -> int:
        """The limit that the server declares, or the one that it has when it declares none."""
        return self.info.max_request_bytes or _DEFAULT_MAX_REQUEST_BYTES

    # Requests

    def samples(self, count: int, contents: Sequence[Content] = (), **fields: Any) -> list[reward_pb2.Sample]:
        """New samples with all that the server needs: one whole group where the scope is one, else each its own."""
        if not self.described:
            raise Broken("what the server needs is not known", explained_by=("info/answers",))
        if self.info.max_samples and count > self.info.max_samples:
            raise NotApplicable(f"needs {count} samples in a call, and the server takes {self.info.max_samples}")
        made = []
        for content in contents or self._material.draw(count):
            self._samples_made += 1
            digest = hashlib.sha256(f"{content.prompt}\0{content.completion}".encode()).hexdigest()
            sample = reward_pb2.Sample(
                sample_id=f"{self._samples_made:05}-{digest[:16]}",
                group_id=f"group-{self._samples_made:05}",
                group_size=1,
                prompt=content.prompt,
                completion=content.completion,
                metadata=self._material.columns(content, self.info.required_metadata),
            )
            if self.info.needs_token_ids:
                sample.completion_token_ids.extend(token_ids(content.completion))
            made.append(sample)
        for sample in made if self.in_groups else ():
            sample.group_id, sample.group_size = made[0].group_id, len(made)
        for sample in made:
            sample.MergeFrom(reward_pb2.Sample(**fields))
        return made

    def unit(self) -> list[reward_pb2.Sample]:
        """A few new samples, one group where the scope is one; a single one might be abstained from, and say little."""
        return self.samples(min(_UNIT_SAMPLES, self.info.max_samples or _UNIT_SAMPLES))

    def renamed(self, samples: Sequence[reward_pb2.Sample]) -> list[reward_pb2.Sample]:
        """The same contents as new samples, in groups of the same shape."""
        self._samples_made += 1
        copies = []
        for sample in samples:
            copy = reward_pb2.Sample()
            copy.CopyFrom(sample)
            copy.sample_id = f"{sample.sample_id}-{self._samples_made:05}"
            copy.group_id = f"{sample.group_id}-{self._samples_made:05}"
            copies.append(copy)
        return copies

    def request(self, samples: Sequence[reward_pb2.Sample], **fields: Any) -> reward_pb2.ScoreRequest:
        """An ordinary request for them; `fields` replace what it would have otherwise."""
        json_keys = [*self._material.json_keys, *fields.pop("json_metadata_keys", ())]
        fields = {"reward": self.reward, "run_id": self.run_id, "json_metadata_keys": json_keys} | fields
        return reward_pb2.ScoreRequest(samples=samples, **fields)

    # Calls

    async def describe(self, reward: str, mistake: Mistake | None = None) -> Exchange:
        """One GetRewardInfo call, whatever comes of it."""
        request = reward_pb2.GetRewardInfoRequest(reward=reward)
        return await self._call("GetRewardInfo", request, self.timeout, (), mistake, True)

    async def score(
        self,
        request: reward_pb2.ScoreRequest | bytes,
        *,
        within: float | None = None,
        headers: Headers = (),
        mistake: Mistake | None = None,
        watched: bool = True,
    ) -> Exchange:
        """One Score call, whatever comes of it; `within`: its deadline, where it is not the ordinary one."""
        return await self._call("Score", request, within or self.timeout, headers, mistake, watched)

    async def abandon(self, request: reward_pb2.ScoreRequest, after: float) -> None:
        """Make a Score call and cancel it after so many seconds."""
        call: Any = stub(self.channel, "Score")(request, timeout=self.timeout, metadata=self.headers)
        ended = asyncio.ensure_future(outcome_of(call))
        await asyncio.wait([ended], timeout=after)
        call.cancel()
        await ended

    async def settled(self, request: reward_pb2.ScoreRequest, **call: Any) -> Exchange:
        """The exchange in which the server neither was overloaded nor away; the last one when patience ends."""
        wait = Wait(self._for_overload)
        while True:
            exchange = await self.score(request, **call)
            status = exchange.status
            if status is None or not status.passing or (exchange.mistake and status.code in exchange.mistake.codes):
                return exchange
            if not await wait.sleep(status.retry_seconds or _AGAIN_SECONDS):
                return exchange

    async def accepted(self, request: reward_pb2.ScoreRequest, what: str = "a request", **call: Any) -> Exchange:
        """The exchange in which the server answered; Broken when it gave a status to `what`."""
        exchange = await self.settled(request, **call)
        if exchange.status is not None:
            raise Broken(f"no answer to {what}", exchange, explained_by=basics(exchange))
        return exchange

    async def answered(self, request: reward_pb2.ScoreRequest, **call: Any) -> Exchange:
        """The same, with an answer that a client can use."""
        exchange = await self.accepted(request, **call)
        for each in CASES.values():
            for problem in each.check(exchange) if each.check else ():
                if problem is not None:
                    raise Broken(problem, exchange, explained_by=(each.id,))
        return exchange

    async def judge(
        self, samples: Sequence[reward_pb2.Sample], *, headers: Headers = (), **fields: Any
    ) -> list[reward_pb2.SampleResult]:
        """The final result of each sample, in their order; PENDING ones are asked for again."""
        wait = Wait(self._for_pending)
        final: dict[str, reward_pb2.SampleResult] = {}
        asked = list(samples)
        while True:
            exchange = await self.answered(self.request(asked, **fields), headers=headers)
            pending = {}
            for sample, result in exchange.judgements():
                if result.HasField("pending"):
                    pending[sample.sample_id] = seconds_of(result.pending.retry_after)
                else:
                    final[sample.sample_id] = result
            if not pending:
                return [final[sample.sample_id] for sample in samples]
            asked = [sample for sample in asked if sample.sample_id in pending]
            if not await wait.sleep(max(pending.values())):
                self.unresolved = exchange
                raise Broken("samples stay PENDING", exchange, alone=False, explained_by=("pending/resolved",))

    async def survey(self) -> tuple[list[reward_pb2.Sample], list[reward_pb2.SampleResult]]:
        """Ordinary samples and what became of them; sent once in a run."""
        if self._survey is None:
            self._survey = asyncio.ensure_future(self._send_survey())
        return await self._survey

    async def _send_survey(self) -> tuple[list[reward_pb2.Sample], list[reward_pb2.SampleResult]]:
        count = min(_SURVEY_SAMPLES, self.info.max_samples or _SURVEY_SAMPLES)
        samples = self.samples(count, self._material.first(count))
        if self.info.needs_token_ids:
            # The first token is the policy's own, the others a tool's.
            for sample in samples[::2]:
                sample.sampled_ranges.add(first=0, past_last=1)
        return samples, await self.judge(samples)

    @property
    def last(self) -> Exchange:
        """The latest exchange."""
        return self.exchanges[-1]

    async def _call(
        self, method: str, request: Any, within: float, headers: Headers, mistake: Mistake | None, watched: bool
    ) -> Exchange:
        began = time.monotonic()
        response, status = await outcome_of(
            stub(self.channel, method)(request, timeout=within, metadata=(*self.headers, *headers))
        )
        seconds = time.monotonic() - began
        exchange = Exchange(
            method, request, response, status, seconds, self._case_id, self.in_groups, headers, mistake, watched
        )
        self.exchanges.append(exchange)
        return exchange


def basics(exchange: Exchange) -> tuple[str, ...]:
    """The cases whose failure explains that an ordinary request got a status."""
    assert isinstance(exchange.request, reward_pb2.ScoreRequest)
    late = ("deadline/answered-in-time",) if exchange.code is grpc.StatusCode.DEADLINE_EXCEEDED else ()
    single = ("score/single-sample",) if len(exchange.request.samples) == 1 else ()
    return ("score/ordinary-batch", *late, *single)
