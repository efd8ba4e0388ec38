"""The judge kind: its rubric, the reading of its answers, and what a real HTTP endpoint makes it do."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from reward_server import metrics
from reward_server.kinds import Limits, RewardLoadError, Sample
from reward_server.kinds.judge import JudgeOptions, JudgeReward
from reward_server.kinds.rubric import Rubric
from reward_server.kinds.verdict import UnreadableVerdictError, read_score
from reward_server.memory import SampleKey
from reward_server.results import Failed, Outcome, Pending, Scored
from reward_server.scheduler import Scheduler
from rlhf.failures import RpcFailure
from rlhf.reward.v1 import reward_pb2_grpc
from tests.reward_server.conftest import request, until
from tests.reward_server.conftest import sample as message
from tests.reward_server.kinds.http_servers import Answer, Asked, Script, WebServer, until_gone, unused_url
from tests.support.processes import StartProcess

RUBRIC = "How kind is this, from 1 to 10?\n$completion"


def says(content: str | None, finish_reason: str = "stop", **message: Any) -> Answer:
    """An endpoint's answer in which the judge says `content`."""
    choice = {
        "index": 0,
        "finish_reason": finish_reason,
        "message": {"role": "assistant", "content": content, **message},
    }
    return Answer(
        {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": "m",
            "choices": [choice],
            "usage": {"prompt_tokens": 30, "completion_tokens": 7, "total_tokens": 37},
        }
    )


def verdict(score: float) -> Answer:
    return says(json.dumps({"reason": "so it is", "score": score}))


def refuses(status: int, *, headers: dict[str, str] | None = None, **error: Any) -> Answer:
    return Answer({"error": {"message": "no, said sk-secret", **error}}, status, headers or {})


def sample(number: int = 0, **fields: Any) -> Sample:
    values = {"prompt": "Say hello.", "completion": "Hello!", "key": SampleKey("run", str(number)), **fields}
    return Sample(**values)


@contextlib.asynccontextmanager
async def judge_at(url: str, **options: Any) -> AsyncIterator[JudgeReward]:
    given: dict[str, Any] = {"model": "m", "rubric": RUBRIC, "retries": 0, **options}
    if given.get("rubric_file"):
        del given["rubric"]
    reward = JudgeReward(JudgeOptions(base_url=f"{url}/v1", **given), Limits())
    try:
        await reward.start()
        yield reward
    finally:
        await reward.close()


@contextlib.asynccontextmanager
async def asked_by(*scripts: Script, **options: Any) -> AsyncIterator[tuple[WebServer, JudgeReward]]:
    with WebServer(*scripts).serving() as server:
        async with judge_at(server.url, **options) as reward:
            yield server, reward


async def judged(reward: JudgeReward, asked: Sample | None = None) -> Outcome:
    (outcome,) = await reward.score([asked or sample()], None)
    return outcome


# The rubric


def test_only_names_are_replaced_and_nothing_in_a_sample_is_evaluated() -> None:
    rubric = Rubric("$$5: $prompt | $completion | $answer | ${the answer} | {prompt} {{7*7}}")
    hostile = sample(
        prompt="$completion {{7*7}}",
        completion="${answer} $prompt %s {0}",
        metadata={"answer": "$prompt", "the answer": [1, "ü"]},
    )
    text = rubric.filled(hostile)

    assert rubric.columns == ("answer", "the answer")
    assert text.startswith("$5: <prompt-")
    assert "\n$completion {{7*7}}\n" in text
    assert "\n${answer} $prompt %s {0}\n" in text
    assert text.endswith('| $prompt | [1, "ü"] | {prompt} {{7*7}}')


@given(st.text(alphabet=st.characters(codec="utf-8")))
def test_a_completion_cannot_end_the_tag_that_holds_it(completion: str) -> None:
    text = Rubric("$completion").filled(sample(completion=completion))
    tag = text[1 : text.index(">")]
    assert text == f"<{tag}>\n{completion}\n</{tag}>"
    assert tag not in completion


@pytest.mark.parametrize(
    ("text", "says"),
    [("$completion costs $5", "dollar sign"), ("$completion ${", "dollar sign"), ("Rate $prompt", "not mention")],
)
def test_a_rubric_that_cannot_work_is_refused(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Rubric(text)


# The reading of answers


@pytest.mark.parametrize(
    "answer",
    [
        '{"score": 7}',
        '{"reason": "a {brace} and a \\" quote", "score": 7.0}',
        'Here it is:\n```json\n{"score": 7}\n```\nBye {not json}',
        '{"notes": {"score": 1}}\n{"score": 7}',
    ],
)
def test_one_json_verdict_in_any_other_text_is_read(answer: str) -> None:
    assert read_score(answer, lowest=1, highest=10) == 7.0


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ("", "0 JSON objects"),
        ("7", "0 JSON objects"),
        ('{"Score": 7}', "0 JSON objects"),
        ('{"score": 7} {"score": 7}', "2 JSON objects"),
        ('{"score": 1, "score": 10}', "twice"),
        ('{"notes": {"score": 7}}', "0 JSON objects"),
        ('{"score": "7"}', "not a number"),
        ('{"score": true}', "not a number"),
        ('{"score": null}', "not a number"),
        ('{"score": [7]}', "not a number"),
        ('{"score": NaN}', "nan"),
        ('{"score": 1e999}', "inf"),
        ('{"score": 0.99}', "between 1 and 10"),
        ('{"score": 11}', "between 1 and 10"),
        ('{"score": 7', "0 JSON objects"),
        ('{"notes": {"score": 7}, "sco', "0 JSON objects"),
        ('{"a":' * 50_000, "0 JSON objects"),
    ],
)
def test_anything_but_one_score_on_the_scale_is_unreadable(answer: str, problem: str) -> None:
    with pytest.raises(UnreadableVerdictError, match=problem):
        read_score(answer, lowest=1, highest=10)


@pytest.mark.parametrize(
    ("answer", "score"), [("Score: 7/10", 7.0), ("Score: 7 Score: 7", None), ("none", None), ("Score: /10", None)]
)
def test_a_pattern_has_to_match_exactly_once(answer: str, score: float | None) -> None:
    pattern = re.compile(r"Score: (\d*)")
    if score is None:
        with pytest.raises(UnreadableVerdictError):
            read_score(answer, lowest=1, highest=10, pattern=pattern)
    else:
        assert read_score(answer, lowest=1, highest=10, pattern=pattern) == score


@given(
    score=st.floats(1, 10),
    reason=st.text(),
    before=st.text(alphabet=st.characters(exclude_characters="{")),
    after=st.text(alphabet=st.characters(exclude_characters="{")),
)
def test_every_verdict_that_json_can_write_is_read_back(score: float, reason: str, before: str, after: str) -> None:
    line = json.dumps({"reason": reason, "score": score})
    assert read_score(f"{before}{line}{after}", lowest=1, highest=10) == score


@given(st.one_of(st.text(), st.text(alphabet='{}[]":,score0123456789.eE-+NaInfty \n')))
def test_no_answer_gives_a_score_off_the_scale_or_another_error(answer: str) -> None:
    with contextlib.suppress(UnreadableVerdictError):
        assert 1 <= read_score(answer, lowest=1, highest=10) <= 10


# The endpoint


async def test_a_verdict_becomes_a_reward_between_the_ends_of_the_range() -> None:
    async with asked_by(verdict(1), verdict(10), verdict(5.5), reward_range=(-1, 1)) as (server, reward):
        outcomes = [await judged(reward) for _ in range(3)]

    rewards = [outcome.reward for outcome in outcomes if isinstance(outcome, Scored)]
    assert rewards == [-1.0, 1.0, 0.0]
    assert outcomes[2] == Scored(0.0, {"judge_score": 5.5, "votes": 1.0})
    body = server.asked[0].body
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0.0, 512)
    assert "seed" not in body
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert body["messages"][1]["content"] == Rubric(RUBRIC).filled(sample())


async def test_settings_of_the_request_are_sent_as_given_and_null_is_not_sent() -> None:
    options = {"temperature": None, "max_tokens": None, "seed": 3, "system": "", "extra_body": {"top_p": 0.5}}
    async with asked_by(verdict(5), **options) as (server, reward):
        await judged(reward)

    body = server.asked[0].body
    assert body.keys() == {"model", "messages", "seed", "top_p"}
    assert [message["role"] for message in body["messages"]] == ["user"]


async def test_several_votes_are_put_together() -> None:
    options = {"votes": 3, "temperature": 0.7, "seed": 10, "attempts": 2}
    for vote, score in (("mean", 6.0), ("median", 5.0)):
        async with asked_by(verdict(4), verdict(5), verdict(9), vote=vote, **options) as (server, reward):
            outcome = await judged(reward)
        assert isinstance(outcome, Scored)
        assert outcome.components == {"judge_score": score, "votes": 3.0}
        assert [asked.body["seed"] for asked in server.asked] == [10, 12, 14]


async def test_an_unreadable_answer_is_shown_to_the_judge_which_may_mend_it() -> None:
    async with asked_by(says("Quite kind."), verdict(10)) as (server, reward):
        outcome = await judged(reward)

    assert isinstance(outcome, Scored)
    assert outcome.reward == 1.0
    assert server.asked[1].body["messages"][2] == {"role": "assistant", "content": "Quite kind."}
    assert "0 JSON objects" in server.asked[1].body["messages"][3]["content"]


@pytest.mark.parametrize(
    "answer", [says("Quite kind."), says(None), says(""), verdict(11), says('{"score": 7', "length")]
)
async def test_what_stays_unreadable_fails_the_sample(answer: Answer) -> None:
    async with asked_by(answer, attempts=2) as (server, reward):
        outcome = await judged(reward)

    assert isinstance(outcome, Failed)
    assert outcome.code == "JUDGE_UNREADABLE"
    assert len(server.asked) == 2
    assert all(message["content"] for asked in server.asked for message in asked.body["messages"])


@pytest.mark.parametrize(
    "answer",
    [
        refuses(400, code="content_policy_violation"),
        refuses(400, param="messages.1.content", code="context_length_exceeded"),
        refuses(422),
        refuses(413),
        says(None, refusal="I would rather not."),
        says("", "content_filter"),
    ],
)
async def test_what_the_endpoint_will_not_judge_fails_at_once(answer: Answer) -> None:
    async with asked_by(answer, retries=2) as (server, reward):
        outcome = await judged(reward)

    assert isinstance(outcome, Failed)
    assert outcome.code == "JUDGE_REFUSED"
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "answer", [refuses(401), refuses(403), refuses(404), refuses(405), refuses(400, param="temperature")]
)
async def test_what_the_options_are_to_blame_for_fails_no_sample_and_quotes_no_key(answer: Answer) -> None:
    async with asked_by(answer, retries=2) as (server, reward):
        with pytest.raises(RpcFailure, match=f"status {answer.status}") as raised:
            await judged(reward)

    assert raised.value.code is grpc.StatusCode.INTERNAL
    assert server.url in raised.value.message
    assert "sk-secret" not in raised.value.message
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "answer",
    [
        Answer(b"<html>", headers={"content-type": "text/html"}),
        Answer(b"{oops"),
        Answer({"hello": "world"}),
        Answer({"choices": []}),
        Answer([1]),
    ],
)
async def test_an_endpoint_that_speaks_otherwise_is_named(answer: Answer) -> None:
    async with asked_by(answer, attempts=2) as (server, reward):
        with pytest.raises(RpcFailure, match="OpenAI-compatible") as raised:
            await judged(reward)
    assert raised.value.code is grpc.StatusCode.INTERNAL
    assert len(server.asked) == 2


@pytest.mark.parametrize("status", [408, 409, 429, 500, 503])
async def test_a_failure_that_may_pass_is_tried_again(status: int) -> None:
    async with asked_by(refuses(status), verdict(10), retries=1) as (server, reward):
        assert isinstance(await judged(reward), Scored)
    assert len(server.asked) == 2


async def test_retry_after_is_waited_out() -> None:
    async with asked_by(refuses(429, headers={"retry-after": "1"}), verdict(10), retries=1) as (server, reward):
        assert isinstance(await judged(reward), Scored)
    assert server.asked[1].at - server.asked[0].at >= 1.0


@pytest.mark.parametrize("status", [429, 500])
async def test_what_stays_away_is_pending_for_as_long_as_the_endpoint_says(status: int) -> None:
    async with asked_by(refuses(status, headers={"retry-after": "300"}), retries=2) as (server, reward):
        assert await judged(reward) == Pending(300.0)
    assert len(server.asked) == 1


async def test_an_endpoint_that_is_not_there_is_pending() -> None:
    async with judge_at(unused_url(), retries=1) as reward:
        assert isinstance(await judged(reward), Pending)


async def test_an_endpoint_that_hangs_is_pending() -> None:
    async with asked_by(until_gone, timeout=2.0) as (server, reward):
        assert isinstance(await judged(reward), Pending)
    assert server.asked


async def test_a_column_of_the_rubric_is_required() -> None:
    rubric = "$completion against ${the answer}"
    async with asked_by(verdict(10), rubric=rubric) as (server, reward):
        lacking = await judged(reward)
        having = await judged(reward, sample(metadata={"the answer": 42}))

    assert reward.description.required_metadata == ("the answer",)
    assert isinstance(lacking, Failed)
    assert lacking.code == "MISSING_METADATA"
    assert isinstance(having, Scored)
    assert server.asked[0].body["messages"][1]["content"].endswith("against 42")


async def test_half_a_surrogate_pair_in_a_column_is_no_reason_to_fail() -> None:
    async with asked_by(verdict(10), rubric="$completion $odd") as (_, reward):
        assert isinstance(await judged(reward, sample(metadata={"odd": "\ud800"})), Scored)


async def test_cancelling_ends_the_request() -> None:
    ended = threading.Event()

    def script(asked: Asked) -> Answer:
        answer = until_gone(asked)
        if answer.status == 499:
            ended.set()
        return answer

    async with asked_by(script, retries=2) as (server, reward):
        call = asyncio.create_task(judged(reward))
        await until(lambda: server.asked)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await until(ended.is_set)
    assert len(server.asked) == 1


async def test_no_more_samples_are_judged_at_once_than_the_options_say() -> None:
    two = threading.Barrier(2)

    def in_pairs(_: Asked) -> Answer:
        two.wait(20)
        return verdict(10)

    async with asked_by(in_pairs, concurrency=2) as (server, reward):
        outcomes = await Scheduler(reward, Limits()).score([sample(number) for number in range(8)])
    assert all(isinstance(outcome, Scored) for outcome in outcomes)
    assert server.most_at_once == 2


async def test_a_running_request_outlives_the_deadline_of_its_caller() -> None:
    release = threading.Event()

    def slow(_: Asked) -> Answer:
        release.wait(20)
        return verdict(10)

    async with asked_by(slow) as (server, reward):
        scheduler = Scheduler(reward, Limits())
        (first,) = await scheduler.score([sample()], time.monotonic() + 0.1)
        assert isinstance(first, Pending)
        release.set()
        (second,) = await scheduler.score([sample()])
        assert isinstance(second, Scored)
    assert len(server.asked) == 1


async def test_the_tokens_spent_are_counted() -> None:
    before = {direction: metrics.JUDGE_TOKENS.labels(direction)._value.get() for direction in ("in", "out")}
    async with asked_by(says("hm"), verdict(10)) as (_, reward):
        await judged(reward)
    after = {direction: metrics.JUDGE_TOKENS.labels(direction)._value.get() for direction in ("in", "out")}
    assert {direction: after[direction] - before[direction] for direction in after} == {"in": 60.0, "out": 14.0}


async def test_the_key_comes_from_its_file_for_each_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-environment")
    key = tmp_path / "key"
    key.write_text("sk-first\n")
    async with asked_by(verdict(10), api_key_file=key) as (server, reward):
        await judged(reward)
        key.write_text("sk-second\n")
        await judged(reward)
        key.unlink()
        assert isinstance(await judged(reward), Pending)
    assert [asked.headers["authorization"] for asked in server.asked] == ["Bearer sk-first", "Bearer sk-second"]
    assert "sk-" not in caplog.text


@pytest.mark.parametrize(("environment", "sent"), [("sk-environment", "sk-environment"), (None, "none")])
async def test_without_a_file_the_key_is_the_environments_or_none(
    environment: str | None, sent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    if environment is not None:
        monkeypatch.setenv("OPENAI_API_KEY", environment)
    async with asked_by(verdict(10)) as (server, reward):
        await judged(reward)
    assert server.asked[0].headers["authorization"] == f"Bearer {sent}"


async def test_the_version_changes_with_whatever_may_change_a_score_and_with_nothing_else(tmp_path: Path) -> None:
    async def version(**options: Any) -> str:
        async with judge_at("http://127.0.0.1:1", **options) as reward:
            return reward.description.version

    file, key = tmp_path / "rubric.txt", tmp_path / "key"
    file.write_text(RUBRIC)
    key.write_text("sk-1")
    changed = [
        {"model": "n"},
        {"rubric": RUBRIC + "!"},
        {"system": "Be strict."},
        {"scale": (0, 10)},
        {"reward_range": (0, 2)},
        {"score_pattern": r"(\d+)"},
        {"temperature": 1.0},
        {"temperature": 1.0, "votes": 3},
        {"temperature": 1.0, "votes": 3, "vote": "median"},
        {"seed": 1},
        {"max_tokens": 9},
        {"extra_body": {"top_p": 0.5}},
    ]
    versions = [await version(), *[await version(**options) for options in changed]]
    assert len(set(versions)) == len(changed) + 1
    assert await version(timeout=3, retries=5, concurrency=2, api_key_file=key) == versions[0]
    assert await version(rubric_file=file) == versions[0]
    file.write_text(RUBRIC + "!")
    assert await version(rubric_file=file) == versions[2]


async def test_a_server_of_its_own_judges_by_it(start_process: StartProcess) -> None:
    with WebServer(verdict(10)).serving() as endpoint:
        options = {"base_url": f"{endpoint.url}/v1", "model": "m", "rubric": RUBRIC}
        server = start_process("reward_server", "--reward", "judge", "--reward-options", json.dumps(options))
        await asyncio.to_thread(server.wait_serving, "rlhf.reward.v1.RewardService")
        async with grpc.aio.insecure_channel(server.address) as channel:
            stub = reward_pb2_grpc.RewardServiceStub(channel)
            answer = await stub.Score(request(message("a"), message("b")), timeout=20)
        text = await asyncio.to_thread(server.metrics_text)
    assert [result.scored.reward for result in answer.results] == [1.0, 1.0]
    assert answer.results[0].scored.components == {"judge_score": 10.0, "votes": 1.0}
    assert 'rlhf_reward_judge_tokens_total{direction="in"} 60.0' in text


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "either rubric or rubric_file"),
        ({"rubric": RUBRIC, "rubric_file": "r.txt"}, "either rubric or rubric_file"),
        ({"rubric": RUBRIC, "scale": (10, 1)}, "lowest score must be below"),
        ({"rubric": RUBRIC, "reward_range": (1, 1)}, "ends must differ"),
        ({"rubric": RUBRIC, "score_pattern": "("}, "not a regular expression"),
        ({"rubric": RUBRIC, "score_pattern": r"\d"}, "exactly one group"),
        ({"rubric": RUBRIC, "votes": 3}, "temperature above 0"),
        ({"rubric": RUBRIC, "extra_body": {"stream": True}}, "stream cannot be set here"),
        ({"rubric": RUBRIC, "api_key": "sk-1"}, "Extra inputs"),
        ({"rubric": RUBRIC, "base_url": "localhost:8000"}, "http://"),
    ],
)
def test_a_mistake_in_the_options_is_explained(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        JudgeOptions(**{"base_url": "http://127.0.0.1:1/v1", "model": "m", **options})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rubric": "Rate $prompt"}, "does not mention"),
        ({"rubric_file": "missing.txt"}, "missing.txt"),
        ({"api_key_file": "missing-key"}, "missing-key"),
    ],
)
async def test_a_mistake_that_shows_at_the_start_is_explained(options: dict[str, Any], says: str) -> None:
    with pytest.raises(RewardLoadError, match=says):
        async with judge_at("http://127.0.0.1:1", **options):
            pass
