"""The remote kind against reward servers that obey the contract, some that do not, and some that are killed."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from reward_server.kinds import Limits, RewardLoadError, Sample, Scope
from reward_server.kinds.breaker import Circuit
from reward_server.kinds.remote import RemoteOptions, RemoteReward
from reward_server.results import Abstained, Failed, Outcome, Pending, Scored
from reward_server.scheduler import Scheduler
from reward_server.wire import decode
from rlhf.channel import RUN_ID_KEY
from rlhf.failures import RpcFailure, overloaded, to_status
from rlhf.reward.v1 import reward_pb2, reward_pb2_grpc
from tests.reward_server.conftest import request, until
from tests.reward_server.conftest import sample as message
from tests.support.processes import StartProcess
from tests.trainer.servers import Change, ScriptedReward, altered, scored, serving, set_reward


def sample(number: int, run_id: str = "run", json_keys: frozenset[str] = frozenset(), **fields: Any) -> Sample:
    decoded = decode(run_id, message(f"{number:03}", **fields), json_keys)
    assert isinstance(decoded, Sample)
    return decoded


@contextlib.asynccontextmanager
async def reward_at(target: str, limits: Limits | None = None, **options: Any) -> AsyncIterator[RemoteReward]:
    reward = RemoteReward(RemoteOptions(target=target, **{"timeout": 10.0, **options}), limits or Limits())
    try:
        await reward.start()
        yield reward
    finally:
        await reward.close()


@contextlib.asynccontextmanager
async def reward_of(server: ScriptedReward, **options: Any) -> AsyncIterator[RemoteReward]:
    async with serving(server.add_to) as target, reward_at(target, **options) as reward:
        yield reward


async def test_it_says_of_itself_what_the_other_server_says() -> None:
    info = {
        "name": "vader",
        "version": "7",
        "max_samples": 5,
        "max_concurrent_calls": 2,
        "scope": reward_pb2.SCOPE_GROUP,
        "required_metadata": ["answer"],
        "needs_token_ids": True,
        "remembers": Duration(seconds=60),
    }
    async with reward_of(ScriptedReward(scored, **info)) as reward:
        said = reward.description
        assert (said.name, said.scope, said.required_metadata) == ("vader", Scope.GROUP, ("answer",))
        assert said.needs_token_ids
        assert said.remembers == 60
        assert said.version.startswith("7+")
        assert (reward.batch_size, reward.concurrency) == (5, 2)


async def test_samples_travel_as_they_came_and_outcomes_come_back_as_they_are() -> None:
    def answer(asked: reward_pb2.ScoreRequest) -> reward_pb2.ScoreResponse:
        results = [
            reward_pb2.SampleResult(
                sample_id="000",
                scored=reward_pb2.Scored(reward=0.5, components={"style": 2.0}, token_rewards=[0.25, 0.0]),
            ),
            reward_pb2.SampleResult(sample_id="001", abstained=reward_pb2.Abstained(reason="not English")),
            reward_pb2.SampleResult(sample_id="002", failed=reward_pb2.Failed(code="NO_STARS", message="no stars")),
            reward_pb2.SampleResult(
                sample_id="003", pending=reward_pb2.Pending(retry_after=Duration(seconds=3, nanos=500_000_000))
            ),
        ]
        return reward_pb2.ScoreResponse(results=results[::-1])

    server = ScriptedReward(answer)
    keys = frozenset({"stars"})
    samples = [
        sample(number, json_keys=keys, metadata={"stars": "4", "rlhf.x": "y"}, completion_token_ids=[5, 6])
        for number in range(4)
    ]
    async with reward_of(server, reward="scripted") as reward:
        outcomes = await reward.score(samples, None)

    (asked,) = server.calls
    assert list(asked.samples) == [each.message for each in samples]
    assert (asked.reward, asked.run_id, list(asked.json_metadata_keys)) == ("scripted", "run", ["stars"])
    assert server.metadata[0][RUN_ID_KEY] == "run"
    assert outcomes == [
        Scored(0.5, {"style": 2.0}, (0.25, 0.0)),
        Abstained("not English"),
        Failed("NO_STARS", "no stars"),
        Pending(3.5),
    ]


async def test_calls_keep_to_one_run_one_kind_of_metadata_and_the_servers_limits() -> None:
    server = ScriptedReward(scored, max_samples=3, max_request_bytes=1000)
    samples = [
        *(sample(number) for number in range(4)),
        *(sample(number, run_id="other") for number in range(4)),
        sample(10, json_keys=frozenset({"stars"}), metadata={"stars": "4"}),
        *(sample(20 + number, "run", completion="x" * 400) for number in range(3)),
        sample(30, completion="x" * 1000),
    ]
    async with reward_of(server) as reward:
        outcomes = await reward.score(samples, None)

    assert outcomes[:-1] == [Scored(1.0)] * 12
    assert isinstance(outcomes[-1], Failed)
    assert outcomes[-1].code == "SAMPLE_TOO_LARGE"
    assert max(len(call.samples) for call in server.calls) == 3
    assert max(call.ByteSize() for call in server.calls) <= 1000
    sent = [(call.run_id, each.sample_id) for call in server.calls for each in call.samples]
    assert sorted(sent) == sorted((each.key.run_id, each.key.sample_id) for each in samples[:-1])
    for call in server.calls:
        assert list(call.json_metadata_keys) == (["stars"] if call.samples[0].sample_id == "010" else [])


async def test_groups_are_never_cut_and_one_that_does_not_fit_fails_whole() -> None:
    server = ScriptedReward(scored, scope=reward_pb2.SCOPE_GROUP, max_samples=4)
    samples = [sample(3 * group + i, group_id=f"g{group}", group_size=3) for group in range(3) for i in range(3)]
    large = [sample(100 + i, group_id="large", group_size=5) for i in range(5)]
    async with reward_of(server) as reward:
        outcomes = await reward.score([*samples, *large], None)

    assert outcomes[:9] == [Scored(1.0)] * 9
    assert {outcome.code for outcome in outcomes[9:] if isinstance(outcome, Failed)} == {"SAMPLE_TOO_LARGE"}
    assert len(outcomes) == 14
    assert [{each.group_id for each in call.samples} for call in server.calls] == [{"g0"}, {"g1"}, {"g2"}]


async def test_no_more_calls_run_at_once_than_the_server_wants() -> None:
    class Counting(ScriptedReward):
        now = most = 0

        async def Score(self, request: reward_pb2.ScoreRequest, context: Any) -> reward_pb2.ScoreResponse:  # noqa: N802
            self.now += 1
            self.most = max(self.most, self.now)
            await until(lambda: self.now == 2 or len(self.calls) == 5)
            response = await super().Score(request, context)
            self.now -= 1
            return response

    server = Counting(scored, max_samples=1, max_concurrent_calls=2)
    async with reward_of(server) as reward:
        assert await reward.score([sample(number) for number in range(6)], None) == [Scored(1.0)] * 6
    assert server.most == 2


@pytest.mark.parametrize(
    "code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED]
)
async def test_what_may_pass_is_tried_again_with_the_same_samples(code: grpc.StatusCode) -> None:
    server = ScriptedReward(code, code, scored)
    async with reward_of(server) as reward:
        assert await reward.score([sample(0)], None) == [Scored(1.0)]
    assert list(server.calls) == [server.calls[0]] * 3


class Overloaded(ScriptedReward):
    """Refuses its first call with a time to come back."""

    def __init__(self, retry_after: float) -> None:
        super().__init__(scored)
        self.retry_after = retry_after
        self.at: list[float] = []

    async def Score(self, request: reward_pb2.ScoreRequest, context: Any) -> reward_pb2.ScoreResponse:  # noqa: N802
        self.at.append(time.monotonic())
        if len(self.at) == 1:
            await context.abort(*to_status(overloaded("too much", self.retry_after)))
        return await super().Score(request, context)


async def test_an_overloaded_server_is_not_asked_before_the_time_it_names() -> None:
    server = Overloaded(1.0)
    async with reward_of(server, breaker_failures=1) as reward:
        assert await reward.score([sample(0)], None) == [Scored(1.0)]
    assert server.at[1] - server.at[0] >= 1.0


async def test_a_time_beyond_the_deadline_is_handed_to_the_caller_at_once() -> None:
    server = Overloaded(100.0)
    async with reward_of(server) as reward:
        assert await reward.score([sample(0)], None) == [Pending(100.0)]
    assert len(server.at) == 1


async def test_what_stays_away_is_pending_and_never_failed() -> None:
    server = ScriptedReward(grpc.StatusCode.UNAVAILABLE)
    async with reward_of(server, breaker_failures=100) as reward:
        answer_by = time.monotonic() + 1.5
        (outcome,) = await reward.score([sample(0)], answer_by)
        assert time.monotonic() <= answer_by + 5
    assert isinstance(outcome, Pending)
    assert len(server.calls) > 1


async def test_a_call_ends_when_the_caller_is_told_to_come_back() -> None:
    class Hanging(ScriptedReward):
        remaining = 0.0

        async def Score(self, request: reward_pb2.ScoreRequest, context: Any) -> reward_pb2.ScoreResponse:  # noqa: N802
            self.remaining = context.time_remaining()
            return await asyncio.Future()

    server = Hanging()
    async with reward_of(server, timeout=60.0) as reward:
        (outcome,) = await reward.score([sample(0)], time.monotonic() + 1.5)
    assert isinstance(outcome, Pending)
    assert server.remaining < 2


@pytest.mark.parametrize(
    "code",
    [grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.PERMISSION_DENIED],
)
async def test_a_final_status_is_this_servers_fault_to_its_callers(code: grpc.StatusCode) -> None:
    server = ScriptedReward(code)
    async with reward_of(server) as reward:
        with pytest.raises(RpcFailure, match=code.name) as raised:
            await reward.score([sample(0)], None)
    assert raised.value.code is grpc.StatusCode.INTERNAL
    assert reward._options.target in raised.value.message
    assert len(server.calls) == 1


MALFORMED: dict[str, tuple[Change, str]] = {
    "NaN": (set_reward(math.nan), "not finite"),
    "no reward": (lambda result: result.scored.ClearField("reward"), "scored without a reward"),
    "no outcome": (lambda result: result.ClearField("outcome"), "no outcome"),
    "unknown id": (lambda result: setattr(result, "sample_id", "nobody"), "'nobody' was not asked for"),
    "repeated id": (lambda result: setattr(result, "sample_id", "001"), "'001' is answered 2 times"),
    "wrong length": (lambda result: result.scored.token_rewards.extend([1.0]), "1 token rewards for 2 tokens"),
    "pending without a time": (lambda result: result.pending.SetInParent(), "without a retry_after"),
}


@pytest.mark.parametrize(("change", "says"), MALFORMED.values(), ids=MALFORMED.keys())
async def test_a_malformed_answer_names_server_and_sample_after_a_few_attempts(change: Change, says: str) -> None:
    server = ScriptedReward(altered(change))
    samples = [sample(number, completion_token_ids=[5, 6]) for number in range(2)]
    async with reward_of(server) as reward:
        with pytest.raises(RpcFailure, match=says) as raised:
            await reward.score(samples, None)
    assert raised.value.code is grpc.StatusCode.INTERNAL
    assert reward._options.target in raised.value.message
    assert len(server.calls) == 4


async def test_a_missing_result_is_malformed_and_one_malformed_answer_is_forgiven() -> None:
    def without_first(asked: reward_pb2.ScoreRequest) -> reward_pb2.ScoreResponse:
        response = scored(asked)
        del response.results[0]
        return response

    async with reward_of(ScriptedReward(without_first, scored)) as reward:
        assert await reward.score([sample(0), sample(1)], None) == [Scored(1.0)] * 2
    async with reward_of(ScriptedReward(without_first)) as reward:
        with pytest.raises(RpcFailure, match="'000' is not answered"):
            await reward.score([sample(0), sample(1)], None)


async def test_a_server_that_keeps_failing_is_left_alone() -> None:
    server = ScriptedReward(grpc.StatusCode.UNAVAILABLE)
    async with reward_of(server, breaker_failures=2, breaker_seconds=60) as reward:
        (opened,) = await reward.score([sample(0)], None)
        assert isinstance(opened, Pending)
        assert reward._peer.breaker.state is Circuit.OPEN
        assert len(server.calls) == 2

        spared = await asyncio.gather(*(reward.score([sample(number)], None) for number in range(5)))
        assert all(isinstance(outcome, Pending) for outcomes in spared for outcome in outcomes)
        assert len(server.calls) == 2


async def test_a_server_that_was_left_alone_is_probed_once() -> None:
    server = ScriptedReward(grpc.StatusCode.UNAVAILABLE)
    async with reward_of(server, breaker_failures=2, breaker_seconds=0.5) as reward:
        await reward.score([sample(0)], None)
        server._scripts = [scored]
        assert await scored_in_the_end(Scheduler(reward, Limits()), [sample(0)]) == [Scored(1.0)]
        assert reward._peer.breaker.state is Circuit.CLOSED
        assert len(server.calls) == 3


async def scored_in_the_end(scheduler: Scheduler, samples: list[Sample]) -> list[Outcome]:
    """What becomes of them once none is Pending, asked for again and again as a trainer does."""
    async with asyncio.timeout(60):
        while True:
            outcomes = await scheduler.score(samples, time.monotonic() + 5)
            if not any(isinstance(outcome, Pending) for outcome in outcomes):
                return outcomes
            # A call that is answered at once would not let the others run.
            await asyncio.sleep(0.05)


async def test_cancelling_ends_the_call() -> None:
    class Hanging(ScriptedReward):
        began = cancelled = False

        async def Score(self, request: reward_pb2.ScoreRequest, context: Any) -> reward_pb2.ScoreResponse:  # noqa: N802
            self.began = True
            try:
                return await asyncio.Future()
            except asyncio.CancelledError:
                self.cancelled = True
                raise

    server = Hanging()
    async with reward_of(server) as reward:
        call = asyncio.create_task(reward.score([sample(0)], None))
        await until(lambda: server.began)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await until(lambda: server.cancelled)


async def test_a_server_that_comes_back_as_another_reward_stops_everything() -> None:
    server = ScriptedReward(grpc.StatusCode.UNAVAILABLE, scored)
    async with reward_of(server) as reward:
        server.info.version = "2"
        with pytest.raises(RpcFailure, match=r"was version '1' .* is '2' now.*Start this server again") as raised:
            await reward.score([sample(0)], None)
        assert raised.value.code is grpc.StatusCode.INTERNAL
        assert len(server.calls) == 1

        server.info.version = "1"
        assert await reward.score([sample(0)], None) == [Scored(1.0)]


async def test_a_server_restarted_between_two_calls_as_another_reward_is_noticed() -> None:
    async with contextlib.AsyncExitStack() as stack:
        first = ScriptedReward(scored)
        running = await stack.enter_async_context(contextlib.AsyncExitStack())
        target = await running.enter_async_context(serving(first.add_to))
        reward = await stack.enter_async_context(reward_at(target))
        assert await reward.score([sample(0)], None) == [Scored(1.0)]
        await running.aclose()
        await until(lambda: reward._channel.get_state() is not grpc.ChannelConnectivity.READY)

        second = ScriptedReward(scored, version="2")
        await stack.enter_async_context(serving(second.add_to, port=int(target.rpartition(":")[2])))
        with pytest.raises(RpcFailure, match=r"'1' .* '2'"):
            await reward.score([sample(1)], None)
        assert second.calls == []


async def test_the_start_waits_until_the_server_is_ready(unused_tcp_port: int) -> None:
    server = ScriptedReward(scored)
    reward = RemoteReward(RemoteOptions(target=f"127.0.0.1:{unused_tcp_port}"), Limits())
    starting = asyncio.create_task(reward.start())
    await asyncio.wait([starting], timeout=0.1)
    assert not starting.done()
    async with serving(server.add_to, port=unused_tcp_port):
        await asyncio.wait_for(starting, 20)
        assert await reward.score([sample(0)], None) == [Scored(1.0)]
        await reward.close()


@pytest.mark.parametrize(
    ("info", "says"), [({"version": ""}, "states no version"), ({"scope": 7}, "scope 7, which is not known")]
)
async def test_a_server_whose_scores_cannot_be_relied_on_is_refused(info: dict[str, Any], says: str) -> None:
    with pytest.raises(RewardLoadError, match=says):
        async with reward_of(ScriptedReward(scored, **info)):
            pass


async def test_a_reward_that_the_server_does_not_have_is_a_mistake_at_the_start(start_process: StartProcess) -> None:
    server = start_process("reward_server", "--reward", "length", "--reward-options", '{"target": 3}')
    server.wait_serving("rlhf.reward.v1.RewardService")
    with pytest.raises(RewardLoadError, match=r"NOT_FOUND.*nonsense"):
        async with reward_at(server.address, reward="nonsense"):
            pass


async def test_a_remote_of_itself_is_given_up_with_a_hint(start_process: StartProcess, unused_tcp_port: int) -> None:
    address = f"127.0.0.1:{unused_tcp_port}"
    options = f'{{"target": "{address}", "start_timeout": 1}}'
    server = start_process("reward_server", "--reward", "remote", "--reward-options", options, listen=address)
    assert server.wait_exit() != 0
    assert "does it wait for this one in turn?" in server.log_text()


async def test_a_chain_of_servers_scores_as_the_last_one(start_process: StartProcess) -> None:
    last = start_process("reward_server", "--reward", "length", "--reward-options", '{"target": 3}')
    last.wait_serving("rlhf.reward.v1.RewardService")
    options = f'{{"target": "{last.address}"}}'
    first = start_process("reward_server", "--reward", "remote", "--reward-options", options)
    first.wait_serving("rlhf.reward.v1.RewardService")
    asked = request(message("a", "one two three"), message("b", "one"))
    async with grpc.aio.insecure_channel(first.address) as front, grpc.aio.insecure_channel(last.address) as back:
        through = await reward_pb2_grpc.RewardServiceStub(front).Score(asked, timeout=20)
        directly = await reward_pb2_grpc.RewardServiceStub(back).Score(asked, timeout=20)
    assert through == directly
    assert through.results[0].scored.reward == 1.0


async def test_a_server_killed_and_restarted_in_the_middle_loses_no_sample_and_changes_no_score(
    start_process: StartProcess, tmp_path: Path
) -> None:
    file, notes, hung, gate = (tmp_path / name for name in ("noted_reward.py", "notes", "hung", "gate"))
    file.write_text(
        "import os, pathlib, threading\n"
        "def noted(completions):\n"
        f"    if len(completions[0]) >= 48 and not pathlib.Path({str(gate)!r}).exists():\n"
        f"        pathlib.Path({str(hung)!r}).touch()\n"
        "        threading.Event().wait()\n"
        f"    with pathlib.Path({str(notes)!r}).open('a') as notes:\n"
        "        notes.writelines(f'{text}\\n' for text in completions)\n"
        "    return [float(os.getpid())] * len(completions)\n"
    )
    flags = ("--reward", f"{file}:noted", "--batch-size", "4")
    server = start_process("reward_server", *flags)
    server.wait_serving("rlhf.reward.v1.RewardService")
    samples = [sample(number, completion="x" * number) for number in range(100)]
    limits = Limits(batch_size=4, concurrency=4)
    async with reward_at(server.address, limits, breaker_seconds=0.5) as reward:
        scheduler = Scheduler(reward, limits)
        before = await scored_in_the_end(scheduler, samples[:48])
        scoring = asyncio.create_task(scored_in_the_end(scheduler, samples))
        await until(hung.exists)
        address = server.address
        server.kill()
        gate.touch()
        again = start_process("reward_server", *flags, listen=address)
        outcomes = await scoring

    assert before == [Scored(float(server.pid))] * 48
    assert outcomes == [*before, *[Scored(float(again.pid))] * 52]
    assert sorted(notes.read_text().splitlines(), key=len) == ["x" * number for number in range(100)]
