"""RewardClient against servers that obey the contract, and servers that don't."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from rlhf.channel import RetryPolicy, Waiting
from rlhf.failures import RpcFailure
from rlhf.reward.v1 import reward_pb2
from tests.trainer.servers import Change, ScriptedReward, altered, scored, serving, set_reward
from trainer.clients.policy import BrokenServerError, FinishReason
from trainer.clients.rewards import (
    Abstained,
    Failed,
    RewardChangedError,
    RewardClient,
    RewardSample,
    Scored,
)

FAST = RetryPolicy(initial=0.001, maximum=0.01)


def sample(number: int, **fields: object) -> RewardSample:
    values: dict[str, object] = {
        "sample_id": f"run/1/{number}/hash",
        "prompt": "prompt",
        "completion": "completion",
        "completion_ids": (1, 2, 3),
        "finish_reason": FinishReason.EOS,
    }
    return RewardSample(**{**values, **fields})  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def client_of(server: ScriptedReward, **options: object) -> AsyncIterator[RewardClient]:
    async with serving(server.add_to) as address:
        client = RewardClient(address, run_id="run", retry=FAST, timeout=5.0, **options)  # type: ignore[arg-type]
        try:
            await client.pin()
            yield client
        finally:
            await client.close()


class Watch:
    """Remembers what it is told, and which calls wait now."""

    def __init__(self) -> None:
        self.seen: list[Waiting] = []
        self.calls: set[object] = set()
        self.called = asyncio.Event()

    def waiting(self, call: object, waiting: Waiting) -> None:
        self.seen.append(waiting)
        self.calls.add(call)
        self.called.set()

    def over(self, call: object) -> None:
        self.calls.discard(call)


async def test_results_are_matched_by_id_in_any_order() -> None:
    def answer(request: reward_pb2.ScoreRequest) -> reward_pb2.ScoreResponse:
        results = [
            reward_pb2.SampleResult(
                sample_id=each.sample_id,
                scored=reward_pb2.Scored(reward=float(each.sample_id.split("/")[2]), token_rewards=[0.5, 0, 0]),
            )
            for each in request.samples
        ]
        return reward_pb2.ScoreResponse(results=results[::-1])

    async with client_of(ScriptedReward(answer)) as client:
        outcomes = await asyncio.gather(*(client.score(sample(number)) for number in range(5)))

    assert outcomes == [Scored(float(number), {}, (0.5, 0.0, 0.0)) for number in range(5)]


async def test_batches_keep_to_the_servers_limits() -> None:
    server = ScriptedReward(scored, max_samples=3, max_concurrent_calls=1)

    async with client_of(server) as client:
        await asyncio.gather(*(client.score(sample(number)) for number in range(10)))

    assert max(len(call.samples) for call in server.calls) == 3
    assert sorted(each.sample_id for call in server.calls for each in call.samples) == sorted(
        sample(number).sample_id for number in range(10)
    )


async def test_no_request_is_larger_than_the_server_takes() -> None:
    server = ScriptedReward(scored, max_request_bytes=1000, max_concurrent_calls=1)

    async with client_of(server) as client:
        outcomes = await asyncio.gather(
            *(client.score(sample(number, completion="x" * 300)) for number in range(8)),
            client.score(sample(8, completion="x" * 1000)),
        )

    assert max(call.ByteSize() for call in server.calls) <= 1000
    assert max(len(call.samples) for call in server.calls) == 2
    assert all(isinstance(outcome, Scored) for outcome in outcomes[:8])
    assert isinstance(outcomes[8], Failed)
    assert outcomes[8].code == "SAMPLE_TOO_LARGE"


async def test_token_ids_travel_only_if_the_server_needs_them() -> None:
    for needs, expected in ((True, [1, 2, 3]), (False, [])):
        server = ScriptedReward(scored, needs_token_ids=needs)
        async with client_of(server) as client:
            await client.score(sample(0))
        assert list(server.calls[0].samples[0].completion_token_ids) == expected


async def test_metadata_and_the_conversation_reach_the_server() -> None:
    server = ScriptedReward(scored)
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]},
        {"role": "tool", "content": [{"type": "text", "text": "4"}]},
    ]

    async with client_of(server) as client:
        await client.score(sample(0, metadata={"stars": "4"}, json_keys=frozenset({"stars"}), messages=turns))

    (sent,) = server.calls[0].samples
    assert dict(sent.metadata) == {"stars": "4"}
    assert list(server.calls[0].json_metadata_keys) == ["stars"]
    assert [[part.text for part in turn.parts] for turn in sent.messages] == [["Hi"], [], ["4"]]
    assert sent.messages[1].extra_json == '{"tool_calls": [{"id": 1}]}'


async def test_final_outcomes_without_a_score_come_back_as_they_are() -> None:
    def answer(request: reward_pb2.ScoreRequest) -> reward_pb2.ScoreResponse:
        ids = [each.sample_id for each in request.samples]
        failed = reward_pb2.Failed(code="NO_COLUMN", message="stars is missing")
        return reward_pb2.ScoreResponse(
            results=[
                reward_pb2.SampleResult(sample_id=ids[0], abstained=reward_pb2.Abstained(reason="not English")),
                reward_pb2.SampleResult(sample_id=ids[1], failed=failed),
            ]
        )

    async with client_of(ScriptedReward(answer)) as client:
        outcomes = await asyncio.gather(client.score(sample(0)), client.score(sample(1)))

    assert outcomes == [Abstained("not English"), Failed("NO_COLUMN", "stars is missing")]


async def test_a_pending_sample_is_sent_again_in_full_and_said_to_be_waited_for() -> None:
    def pending(request: reward_pb2.ScoreRequest) -> reward_pb2.ScoreResponse:
        later = reward_pb2.Pending(retry_after=Duration(nanos=10_000_000))
        return reward_pb2.ScoreResponse(
            results=[reward_pb2.SampleResult(sample_id=each.sample_id, pending=later) for each in request.samples]
        )

    server = ScriptedReward(pending, pending, scored)
    watch = Watch()

    async with client_of(server, watch=watch) as client:
        outcome = await client.score(sample(0))
        await asyncio.sleep(0)  # what follows the result

    assert outcome == Scored(1.0)
    assert not watch.calls
    assert [call.samples[0] for call in server.calls] == [server.calls[0].samples[0]] * 3
    assert [waiting.attempt for waiting in watch.seen] == [1, 2]
    assert "pending" in watch.seen[0].reason


async def test_an_absurd_delay_is_waited_out_like_a_long_one_beside_samples_that_are_scored() -> None:
    def answer(request: reward_pb2.ScoreRequest) -> reward_pb2.ScoreResponse:
        response = scored(request)
        for result in response.results:
            if result.sample_id == sample(0).sample_id:
                result.pending.retry_after.CopyFrom(Duration(seconds=2**63 - 1, nanos=2**31 - 1))
        return response

    async with client_of(ScriptedReward(answer)) as client:
        absurd = asyncio.create_task(client.score(sample(0)))
        scores = await asyncio.wait_for(asyncio.gather(*(client.score(sample(n)) for n in range(1, 4))), timeout=5)
        assert scores == [Scored(1.0)] * 3
        assert not absurd.done()
        absurd.cancel()


async def test_a_server_that_is_away_is_asked_again_with_the_same_ids() -> None:
    server = ScriptedReward(grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, scored)

    async with client_of(server) as client:
        assert await client.score(sample(0)) == Scored(1.0)

    assert [call.samples[0].sample_id for call in server.calls] == [sample(0).sample_id] * 3


@pytest.mark.parametrize("code", [grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED])
async def test_a_final_status_is_raised_and_not_retried(code: grpc.StatusCode) -> None:
    server = ScriptedReward(code)

    async with client_of(server) as client:
        with pytest.raises(RpcFailure) as raised:
            await client.score(sample(0))

    assert raised.value.code is code
    assert len(server.calls) == 1


MALFORMED: dict[str, tuple[Change, str]] = {
    "NaN": (set_reward(math.nan), "not finite"),
    "infinite": (set_reward(-math.inf), "not finite"),
    "beyond float32": (set_reward(1e300), "too large"),
    "no reward": (lambda result: result.scored.ClearField("reward"), "scored without a reward"),
    "no outcome": (lambda result: result.ClearField("outcome"), "no outcome"),
    "unknown id": (lambda result: setattr(result, "sample_id", "nobody"), "'nobody' was not asked for"),
    "repeated id": (lambda result: setattr(result, "sample_id", sample(1).sample_id), "is answered 2 times"),
    "wrong length": (lambda result: result.scored.token_rewards.extend([1.0]), "1 token rewards for 3 tokens"),
    "NaN token": (lambda result: result.scored.token_rewards.extend([0, math.nan, 0]), "token reward.*not finite"),
    "NaN component": (lambda result: result.scored.components.update({"x": math.nan}), "component.*not finite"),
    "pending without a time": (lambda result: result.pending.SetInParent(), "without a retry_after"),
}


@pytest.mark.parametrize(("change", "message"), MALFORMED.values(), ids=MALFORMED.keys())
async def test_a_malformed_answer_names_server_and_sample_after_a_few_attempts(change: Change, message: str) -> None:
    server = ScriptedReward(altered(change))

    async with client_of(server) as client:
        outcomes = await asyncio.gather(client.score(sample(0)), client.score(sample(1)), return_exceptions=True)

    assert len(server.calls) == 4
    for outcome in outcomes:
        assert isinstance(outcome, BrokenServerError)
        assert client.target in str(outcome)
    with pytest.raises(BrokenServerError, match=message):
        raise outcomes[0]


async def test_a_missing_result_is_a_malformed_answer() -> None:
    def answer(request: reward_pb2.ScoreRequest) -> reward_pb2.ScoreResponse:
        response = scored(request)
        del response.results[0]
        return response

    async with client_of(ScriptedReward(answer)) as client:
        with pytest.raises(BrokenServerError, match="'run/1/0/hash' is not answered"):
            await client.score(sample(0))


async def test_one_malformed_answer_is_forgiven() -> None:
    async with client_of(ScriptedReward(altered(set_reward(math.nan)), scored)) as client:
        assert await client.score(sample(0)) == Scored(1.0)


@pytest.mark.parametrize(
    ("info", "message"), [({"version": ""}, "states no version"), ({"scope": 7}, "scope 7, which this trainer")]
)
async def test_a_server_whose_scores_cannot_be_relied_on_is_refused(info: dict[str, object], message: str) -> None:
    with pytest.raises(BrokenServerError, match=message):
        async with client_of(ScriptedReward(scored, **info)):
            pass


async def test_a_server_that_comes_back_as_another_reward_stops_the_run() -> None:
    server = ScriptedReward(grpc.StatusCode.UNAVAILABLE, scored)

    async with client_of(server) as client:
        server.info.version = "2"
        with pytest.raises(RewardChangedError, match=r"version '1', the server is now '2'"):
            await client.score(sample(0))

    assert len(server.calls) == 1


async def test_a_sample_counts_as_pending_until_it_is_scored_whatever_the_server_says_before() -> None:
    def later(request: reward_pb2.ScoreRequest) -> reward_pb2.ScoreResponse:
        pending = reward_pb2.Pending(retry_after=Duration(nanos=1))
        return reward_pb2.ScoreResponse(
            results=[reward_pb2.SampleResult(sample_id=request.samples[0].sample_id, pending=pending)]
        )

    server = ScriptedReward(grpc.StatusCode.UNAVAILABLE, later, scored)
    seen: list[int] = []

    class Looking(Watch):
        def waiting(self, call: object, waiting: Waiting) -> None:
            seen.append(client.pending)

    async with client_of(server, watch=Looking()) as client:
        before = client.pending
        await client.score(sample(0))

        assert (before, set(seen), len(seen), client.pending) == (0, {1}, 2, 0)


async def test_abandoned_samples_leave_nothing_running() -> None:
    server = ScriptedReward(grpc.StatusCode.UNAVAILABLE)
    watch = Watch()

    async with client_of(server, watch=watch) as client:
        asking = asyncio.create_task(client.score(sample(0)))
        await watch.called.wait()
        await client.abandon()
        assert not watch.calls
        with pytest.raises(asyncio.CancelledError):
            await asking


async def test_a_call_ends_once_nobody_waits_for_its_samples_and_those_that_queue_are_never_sent() -> None:
    server = ScriptedReward(grpc.StatusCode.UNAVAILABLE, scored, max_samples=2, max_concurrent_calls=1)
    watch = Watch()

    async with client_of(server, watch=watch) as client:
        asking = [asyncio.create_task(client.score(sample(number))) for number in range(4)]
        await watch.called.wait()
        for task in asking[:3]:
            task.cancel()

        assert await asking[3] == Scored(1.0)
        assert not watch.calls

    assert [each.sample_id for each in server.calls[-1].samples] == ["run/1/3/hash"]
    assert len(server.calls) == 2
