"""The http kind against a real HTTP server that behaves, and misbehaves, as reward models over HTTP do."""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import json
import math
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from pydantic import ValidationError

from reward_server.kinds import Limits, RewardLoadError, Sample
from reward_server.kinds.breaker import Circuit
from reward_server.kinds.http import HttpOptions, HttpReward
from reward_server.memory import SampleKey
from reward_server.results import Abstained, Failed, Outcome, Pending, Scored
from reward_server.scheduler import Scheduler
from rlhf.failures import RpcFailure
from rlhf.reward.v1 import reward_pb2_grpc
from tests.reward_server.conftest import request, until
from tests.reward_server.conftest import sample as message
from tests.reward_server.kinds.http_servers import Answer, Asked, Script, WebServer, until_gone, unused_url
from tests.support.processes import StartProcess


def sample(number: int = 0, **fields: Any) -> Sample:
    values = {"prompt": "It is ", "completion": "x" * number, "key": SampleKey("run", str(number)), **fields}
    return Sample(**values)


def lengths(asked: Asked) -> Answer:
    return Answer({"rewards": [len(text) for text in asked.body["query"]]})


@contextlib.asynccontextmanager
async def reward_of(url: str, limits: Limits | None = None, **options: Any) -> AsyncIterator[HttpReward]:
    reward = HttpReward(HttpOptions(url=url, **options), limits or Limits())
    await reward.start()
    try:
        yield reward
    finally:
        await reward.close()


@contextlib.asynccontextmanager
async def asked_by(*scripts: Script, **options: Any) -> AsyncIterator[tuple[WebServer, HttpReward]]:
    with WebServer(*scripts).serving() as server:
        async with reward_of(f"{server.url}/get_reward", **options) as reward:
            yield server, reward


async def outcome_of(body: Any, **options: Any) -> list[Outcome]:
    async with asked_by(Answer(body), **options) as (_, reward):
        return await reward.score([sample(1), sample(2)], None)


async def test_a_batch_is_posted_as_openrlhf_posts_it() -> None:
    async with asked_by(lengths) as (server, reward):
        outcomes = await reward.score([sample(1), sample(2)], None)

    assert outcomes == [Scored(7.0), Scored(8.0)]
    assert server.asked[0].body == {
        "query": ["It is x", "It is xx"],
        "prompts": ["It is ", "It is "],
        "labels": ["", ""],
    }


async def test_the_query_may_be_the_completion_alone() -> None:
    async with asked_by(lengths, query="completion") as (_, reward):
        assert await reward.score([sample(3)], None) == [Scored(3.0)]


async def test_a_column_travels_as_the_labels_and_samples_without_it_fail_alone() -> None:
    async with asked_by(lengths, label_column="answer") as (server, reward):
        outcomes = await reward.score([sample(1, metadata={"answer": 42}), sample(2)], None)

    assert reward.description.required_metadata == ("answer",)
    assert server.asked[0].body["labels"] == [42]
    assert outcomes[0] == Scored(7.0)
    assert isinstance(outcomes[1], Failed)
    assert outcomes[1].code == "MISSING_METADATA"


@pytest.mark.parametrize(
    ("body", "rewards"),
    [
        ({"rewards": [0.5, -1]}, [0.5, -1.0]),
        ({"rewards": [[0.5], [-1]]}, [0.5, -1.0]),
        ({"rewards": [0, 1], "scores": [0.1, 0.2], "extra_logs": {"length": [3, 4]}}, [0.0, 1.0]),
    ],
)
async def test_numbers_lists_of_one_number_and_extras_are_understood(body: Any, rewards: list[float]) -> None:
    assert await outcome_of(body) == [Scored(reward) for reward in rewards]


async def test_null_is_an_abstention() -> None:
    outcomes = await outcome_of({"rewards": [None, 1]})
    assert isinstance(outcomes[0], Abstained)
    assert outcomes[1] == Scored(1.0)


@pytest.mark.parametrize(
    ("first", "code"),
    [
        (b"NaN", "NOT_FINITE"),
        (b"-Infinity", "NOT_FINITE"),
        (b"1e999", "NOT_FINITE"),
        (b"1" + b"0" * 400, "NOT_FINITE"),
        (b'"good"', "WRONG_RESULT"),
        (b"[1, 2]", "WRONG_RESULT"),
        (b"{}", "WRONG_RESULT"),
    ],
)
async def test_what_is_no_finite_number_fails_its_own_sample(first: bytes, code: str) -> None:
    outcomes = await outcome_of(b'{"rewards": [' + first + b", 1]}")
    assert isinstance(outcomes[0], Failed)
    assert outcomes[0].code == code
    assert outcomes[1] == Scored(1.0)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"<html>down for maintenance</html>", "not JSON"),
        ({"scores": [1, 2]}, "list `rewards`"),
        ([1, 2], "list `rewards`"),
        ({"rewards": 1}, "list `rewards`"),
        ({"rewards": [1]}, "1 rewards for 2 samples"),
        ({"rewards": [1, 2, 3]}, "3 rewards for 2 samples"),
    ],
)
async def test_a_malformed_body_stops_the_call_after_a_few_attempts(body: Any, says: str) -> None:
    async with asked_by(Answer(body)) as (server, reward):
        with pytest.raises(RpcFailure, match=says) as raised:
            await reward.score([sample(1), sample(2)], None)

    assert raised.value.code is grpc.StatusCode.INTERNAL
    assert server.url in raised.value.message
    assert len(server.asked) == 4


async def test_one_malformed_body_is_forgiven() -> None:
    async with asked_by(Answer(b"oops"), lengths) as (_, reward):
        assert await reward.score([sample(1)], None) == [Scored(7.0)]


@pytest.mark.parametrize("status", [400, 413, 422])
async def test_a_refusal_that_concerns_the_samples_fails_them_at_once(status: int) -> None:
    async with asked_by(Answer(b"too long for me", status)) as (server, reward):
        outcomes = await reward.score([sample(1), sample(2)], None)

    assert outcomes == [Failed("REMOTE_REFUSED", f"status {status}: too long for me")] * 2
    assert len(server.asked) == 1


@pytest.mark.parametrize("status", [307, 401, 403, 404, 405])
async def test_a_refusal_that_concerns_the_options_fails_no_sample(status: int) -> None:
    async with asked_by(Answer(b"", status)) as (server, reward):
        with pytest.raises(RpcFailure, match=f"status {status}") as raised:
            await reward.score([sample(1)], None)

    assert raised.value.code is grpc.StatusCode.INTERNAL
    assert len(server.asked) == 1


@pytest.mark.parametrize("status", [408, 429, 500, 503])
async def test_a_failure_that_may_pass_is_tried_again(status: int) -> None:
    async with asked_by(Answer(b"", status), Answer(b"", status), lengths) as (server, reward):
        assert await reward.score([sample(1)], None) == [Scored(7.0)]

    assert [asked.body for asked in server.asked] == [server.asked[0].body] * 3


async def test_what_stays_away_is_pending_and_never_failed() -> None:
    async with reward_of(unused_url(), timeout=1.0, breaker_failures=100) as reward:
        (outcome,) = await reward.score([sample(1)], None)
    assert isinstance(outcome, Pending)


async def test_a_model_that_does_not_answer_in_time_is_pending() -> None:
    async with asked_by(until_gone, timeout=0.3) as (server, reward):
        (outcome,) = await reward.score([sample(1)], None)
    assert isinstance(outcome, Pending)
    assert server.asked


async def test_the_seconds_of_retry_after_are_waited_out() -> None:
    async with asked_by(Answer(b"", 429, {"retry-after": "1"}), lengths) as (server, reward):
        assert await reward.score([sample(1)], None) == [Scored(7.0)]
    assert server.asked[1].at - server.asked[0].at >= 1.0


async def test_the_date_of_retry_after_is_waited_for() -> None:
    when = math.floor(time.time()) + 2
    not_yet = Answer(b"", 503, {"retry-after": email.utils.formatdate(when, usegmt=True)})
    async with asked_by(not_yet, lengths) as (_, reward):
        assert await reward.score([sample(1)], None) == [Scored(7.0)]
    assert time.time() >= when


async def test_a_retry_after_beyond_the_deadline_is_handed_to_the_caller_at_once() -> None:
    async with asked_by(Answer(b"", 429, {"retry-after": "120"}), timeout=30) as (server, reward):
        (outcome,) = await reward.score([sample(1)], None)
    assert outcome == Pending(120.0)
    assert len(server.asked) == 1


async def test_no_attempt_begins_after_the_caller_was_told_to_come_back() -> None:
    async with asked_by(Answer(b"", 500), breaker_failures=100) as (server, reward):
        (outcome,) = await reward.score([sample(1)], time.monotonic() + 3.0)
    assert isinstance(outcome, Pending)
    # In the 60 seconds of the options it would be eleven.
    assert 1 < len(server.asked) < 6


async def test_a_running_request_outlives_the_deadline_of_its_caller() -> None:
    release = threading.Event()

    def slow(asked: Asked) -> Answer:
        release.wait(20)
        return lengths(asked)

    async with asked_by(slow) as (server, reward):
        scheduler = Scheduler(reward, Limits())
        (first,) = await scheduler.score([sample(1)], time.monotonic() + 0.1)
        assert isinstance(first, Pending)
        release.set()
        assert await scheduler.score([sample(1)]) == [Scored(7.0)]
    assert len(server.asked) == 1


async def test_cancelling_ends_the_request() -> None:
    ended = threading.Event()

    def script(asked: Asked) -> Answer:
        answer = until_gone(asked)
        if answer.status == 499:
            ended.set()
        return answer

    async with asked_by(script) as (server, reward):
        call = asyncio.create_task(reward.score([sample(1)], None))
        await until(lambda: server.asked)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await until(ended.is_set)


async def test_no_more_requests_run_at_once_and_none_is_larger_than_the_options_say() -> None:
    two = threading.Barrier(2)

    def in_pairs(asked: Asked) -> Answer:
        two.wait(20)
        return lengths(asked)

    async with asked_by(in_pairs, concurrency=2, batch_size=3) as (server, reward):
        outcomes = await Scheduler(reward, Limits()).score([sample(number) for number in range(12)])

    assert outcomes == [Scored(6.0 + number) for number in range(12)]
    assert server.most_at_once == 2
    assert [len(asked.body["query"]) for asked in server.asked] == [3] * 4


async def test_a_model_that_keeps_failing_is_left_alone() -> None:
    failing = Answer(b"", 500)
    async with asked_by(failing, timeout=20, breaker_failures=2, breaker_seconds=60) as (server, reward):
        (opened,) = await reward.score([sample(1)], None)
        assert isinstance(opened, Pending)
        assert reward._peer.breaker.state is Circuit.OPEN
        assert len(server.asked) == 2

        spared = await asyncio.gather(*(reward.score([sample(number)], None) for number in range(5)))
        assert all(isinstance(outcome, Pending) for outcomes in spared for outcome in outcomes)
        assert len(server.asked) == 2


async def test_a_model_that_was_left_alone_is_probed_once() -> None:
    failing = Answer(b"", 500)
    async with asked_by(failing, timeout=20, breaker_failures=2, breaker_seconds=0.3) as (server, reward):
        (opened,) = await reward.score([sample(1)], None)
        server.scripts = [lengths]
        probe_may_begin = time.monotonic() + 0.3
        outcome: Outcome = opened
        while isinstance(outcome, Pending):
            assert time.monotonic() < probe_may_begin + 10
            (outcome,) = await reward.score([sample(1)], None)
        assert outcome == Scored(7.0)
        assert reward._peer.breaker.state is Circuit.CLOSED
        assert len(server.asked) == 3


async def test_the_token_file_is_read_for_each_request(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("first\n")
    async with asked_by(lengths, token_file=token, headers={"x-team": "blue"}) as (server, reward):
        await reward.score([sample(1)], None)
        token.write_text("second\n")
        await reward.score([sample(1)], None)
        token.unlink()
        (gone,) = await reward.score([sample(1)], time.monotonic() + 0.1)

    assert [asked.headers["authorization"] for asked in server.asked] == ["Bearer first", "Bearer second"]
    assert server.asked[0].headers["x-team"] == "blue"
    assert isinstance(gone, Pending)


async def test_a_token_that_cannot_be_read_is_a_mistake_at_the_start(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.write_text("\n")
    for path, says in ((tmp_path / "missing", "No such file"), (empty, "empty")):
        with pytest.raises(RewardLoadError, match=says):
            async with reward_of("http://127.0.0.1:1/", token_file=path):
                pass


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"url": "127.0.0.1:5000/get_reward"}, "http://"),
        ({"url": "http://user:secret@127.0.0.1/"}, "no user and password"),
        ({"url": "http://127.0.0.1/", "token_file": "t", "headers": {"Authorization": "x"}}, "exclude each other"),
        ({"url": "http://127.0.0.1/", "headers": {"x": "a\r\nb: c"}}, "plain ASCII"),
        ({"url": "http://127.0.0.1/", "timeout": 0}, "greater than 0"),
        ({"url": "http://127.0.0.1/", "tiemout": 1}, "Extra inputs"),
    ],
)
def test_a_mistake_in_the_options_is_explained(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        HttpOptions(**options)


def test_the_version_changes_with_whatever_may_change_a_score_and_with_nothing_else() -> None:
    def version(**options: Any) -> str:
        return HttpReward(HttpOptions(**{"url": "http://127.0.0.1:1/", **options}), Limits()).description.version

    changed = [
        {"url": "http://127.0.0.1:2/"},
        {"query": "completion"},
        {"label_column": "answer"},
        {"headers": {"x-model": "b"}},
        {"version": "2"},
    ]
    assert len({version(), *(version(**options) for options in changed)}) == len(changed) + 1
    assert version(timeout=5, concurrency=2, batch_size=3, breaker_failures=9, token_file="t") == version()


async def test_a_server_of_its_own_scores_by_it(start_process: StartProcess) -> None:
    with WebServer(lengths).serving() as model:
        options = json.dumps({"url": f"{model.url}/get_reward?key=secret"})
        server = start_process("reward_server", "--reward", "http", "--reward-options", options)
        await asyncio.to_thread(server.wait_serving, "rlhf.reward.v1.RewardService")
        async with grpc.aio.insecure_channel(server.address) as channel:
            stub = reward_pb2_grpc.RewardServiceStub(channel)
            answer = await stub.Score(request(message("a", "x"), message("b", "xx")), timeout=20)
        text = await asyncio.to_thread(server.metrics_text)
    assert [result.scored.reward for result in answer.results] == [6.0, 7.0]
    assert f'rlhf_reward_circuit_state{{kind="http",target="{model.url}/get_reward"}} 0.0' in text
    assert "secret" not in server.log_text() + text
