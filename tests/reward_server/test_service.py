"""RewardService over a real socket: every outcome, and every mistake with the status that reward.proto promises."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from rlhf.channel import RetryPolicy, call_with_retry
from rlhf.failures import RpcFailure, from_rpc_error
from rlhf.reward.v1 import reward_pb2
from tests.reward_server import example_rewards
from tests.reward_server.conftest import Serve, request, sample, until


async def failure(call: Any) -> RpcFailure:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value)


def outcomes(response: reward_pb2.ScoreResponse) -> dict[str, str]:
    return {result.sample_id: result.WhichOneof("outcome") for result in response.results}


async def test_every_sample_gets_exactly_one_result(serve: Serve) -> None:
    stub = await serve("lengths")
    response = await stub.Score(request(sample("a", "x"), sample("b", ""), sample("c", "xyz")))
    assert {result.sample_id: result.scored.reward for result in response.results} == {"a": 1.0, "b": 0.0, "c": 3.0}
    assert all(result.scored.HasField("reward") for result in response.results)


async def test_a_reward_of_zero_is_present(serve: Serve) -> None:
    stub = await serve("lengths")
    (result,) = (await stub.Score(request(sample("a", "")))).results
    assert result.scored.HasField("reward")


async def test_an_async_function_scores_too(serve: Serve) -> None:
    stub = await serve("asynchronous")
    (result,) = (await stub.Score(request(sample("a")))).results
    assert result.scored.reward == 2.0


async def test_each_outcome_concerns_its_own_sample_only(serve: Serve) -> None:
    stub = await serve("by_word")
    words = ["fine", "nan", "inf", "none", "text", "true", "huge"]
    response = await stub.Score(request(*(sample(word, word) for word in words)))
    assert outcomes(response) == {
        "fine": "scored",
        "nan": "failed",
        "inf": "failed",
        "none": "abstained",
        "text": "failed",
        "true": "scored",
        "huge": "failed",
    }
    codes = {result.sample_id: result.failed.code for result in response.results if result.HasField("failed")}
    assert codes == {"nan": "NOT_FINITE", "inf": "NOT_FINITE", "huge": "NOT_FINITE", "text": "WRONG_RESULT"}


@pytest.mark.parametrize(
    ("reward", "code", "says"),
    [
        ("raises", "FUNCTION_RAISED", "KeyError"),
        ("exits", "FUNCTION_RAISED", "SystemExit"),
        ("too_few", "WRONG_RESULT", "1 rewards for 2 completions"),
        ("not_a_list", "WRONG_RESULT", "str"),
    ],
)
async def test_a_function_that_fails_fails_the_samples_of_its_call(
    serve: Serve, reward: str, code: str, says: str
) -> None:
    stub = await serve(reward)
    for again in range(2):
        response = await stub.Score(request(sample(f"a{again}"), sample(f"b{again}")))
        for result in response.results:
            assert result.failed.code == code
            assert says in result.failed.message


async def test_retry_later_is_pending_and_is_asked_again(serve: Serve) -> None:
    stub = await serve("later")
    for _ in range(2):
        (result,) = (await stub.Score(request(sample("a")))).results
        assert result.pending.retry_after.ToTimedelta().total_seconds() == 2.5


async def test_components_and_token_rewards_travel(serve: Serve) -> None:
    stub = await serve("by_token")
    (result,) = (await stub.Score(request(sample("a", completion_token_ids=[5, 6, 7])))).results
    assert result.scored.components == {"tokens": 3.0}
    assert list(result.scored.token_rewards) == [0.5, 0.5, 0.5]


async def test_token_rewards_outside_the_sampled_ranges_fail(serve: Serve) -> None:
    stub = await serve("by_token")
    ranges = [reward_pb2.TokenRange(first=0, past_last=2)]
    (result,) = (await stub.Score(request(sample("a", completion_token_ids=[5, 6, 7], sampled_ranges=ranges)))).results
    assert result.failed.code == "WRONG_RESULT"
    assert "token reward 2" in result.failed.message


async def test_missing_token_ids_fail_by_name(serve: Serve) -> None:
    stub = await serve("by_token")
    (result,) = (await stub.Score(request(sample("a")))).results
    assert result.failed.code == "MISSING_TOKEN_IDS"


async def test_a_missing_column_fails_only_the_sample_without_it(serve: Serve) -> None:
    stub = await serve("with_column")
    response = await stub.Score(request(sample("a", "xx", metadata={"weight": "3"}), sample("b")))
    by_id = {result.sample_id: result for result in response.results}
    assert by_id["a"].scored.reward == 6.5
    assert by_id["b"].failed.code == "MISSING_METADATA"
    assert "weight" in by_id["b"].failed.message


async def test_json_null_is_a_missing_column(serve: Serve) -> None:
    stub = await serve("with_column")
    (result,) = (
        await stub.Score(request(sample("a", metadata={"weight": "null"}), json_metadata_keys=["weight"]))
    ).results
    assert result.failed.code == "MISSING_METADATA"


@pytest.mark.parametrize("text", ["{", "NaN", "", "[1,", "[" * 100_000])
async def test_metadata_that_is_not_json_fails_its_sample(serve: Serve, text: str) -> None:
    stub = await serve("record")
    response = await stub.Score(request(sample("a", metadata={"k": text}), sample("b"), json_metadata_keys=["k"]))
    by_id = {result.sample_id: result for result in response.results}
    assert by_id["a"].failed.code == "INVALID_METADATA"
    assert by_id["b"].HasField("scored")


async def test_a_message_part_of_an_unknown_kind_fails_its_sample(serve: Serve) -> None:
    stub = await serve("record")
    messages = [reward_pb2.ChatMessage(role="user", parts=[reward_pb2.ContentPart()])]
    (result,) = (await stub.Score(request(sample("a", messages=messages)))).results
    assert result.failed.code == "UNKNOWN_CONTENT"


@pytest.mark.parametrize("extra", ["[1]", "{", '"name"'])
async def test_extra_json_that_is_no_object_fails_its_sample(serve: Serve, extra: str) -> None:
    stub = await serve("record")
    (result,) = (
        await stub.Score(request(sample("a", messages=[reward_pb2.ChatMessage(role="tool", extra_json=extra)])))
    ).results
    assert result.failed.code == "INVALID_METADATA"


async def test_a_long_reason_is_cut_to_a_kibibyte(serve: Serve) -> None:
    stub = await serve("raises")
    example_rewards.raises.__globals__["KeyError"] = lambda _: ValueError("é" * 5000)
    try:
        (result,) = (await stub.Score(request(sample("a")))).results
    finally:
        del example_rewards.raises.__globals__["KeyError"]
    assert len(result.failed.message.encode()) <= 1024


@pytest.mark.parametrize(
    ("bad", "path"),
    [
        (request(sample("a"), run_id=""), "run_id"),
        (request(sample("a"), run_id="r" * 257), "run_id"),
        (request(), "samples"),
        (request(*(sample(str(i)) for i in range(5))), "samples"),
        (request(sample("a"), sample("")), "samples[1].sample_id"),
        (request(sample("a" * 257)), "samples[0].sample_id"),
        (request(sample("a"), sample("b"), sample("a")), "samples[2].sample_id"),
        (request(sample("a", group_id="")), "samples[0].group_id"),
        (
            request(
                sample("a", completion_token_ids=[1], sampled_ranges=[reward_pb2.TokenRange(first=0, past_last=2)])
            ),
            "samples[0].sampled_ranges[0].past_last",
        ),
        (
            request(
                sample("a", completion_token_ids=[1], sampled_ranges=[reward_pb2.TokenRange(first=0, past_last=0)])
            ),
            "samples[0].sampled_ranges[0].past_last",
        ),
        (
            request(
                sample(
                    "a",
                    completion_token_ids=[1, 2, 3],
                    sampled_ranges=[
                        reward_pb2.TokenRange(first=0, past_last=2),
                        reward_pb2.TokenRange(first=1, past_last=3),
                    ],
                )
            ),
            "samples[0].sampled_ranges[1].first",
        ),
        (
            request(sample("a", sampled_ranges=[reward_pb2.TokenRange(first=0, past_last=1)])),
            "samples[0].sampled_ranges[0].past_last",
        ),
    ],
)
async def test_a_malformed_request_is_refused_with_the_field_path(
    serve: Serve, bad: reward_pb2.ScoreRequest, path: str
) -> None:
    stub = await serve("record", max_samples=4)
    refused = await failure(stub.Score(bad))
    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.reason == "INVALID_FIELD"
    assert path in [violation.field for violation in refused.violations]
    assert example_rewards.calls == []


async def test_a_reward_that_is_not_here_is_not_found(serve: Serve) -> None:
    stub = await serve("lengths")
    for call in (
        stub.Score(request(sample("a"), reward="taste")),
        stub.GetRewardInfo(reward_pb2.GetRewardInfoRequest(reward="taste")),
    ):
        refused = await failure(call)
        assert refused.code is grpc.StatusCode.NOT_FOUND
        assert [violation.field for violation in refused.violations] == ["reward"]
    await stub.Score(request(sample("a"), reward="lengths"))


async def test_a_request_beyond_max_request_bytes_is_refused_without_retry_info(serve: Serve) -> None:
    stub = await serve("lengths", max_message_bytes=4 << 20)
    refused = await failure(stub.Score(request(sample("a", "x" * (5 << 20)))))
    assert refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert refused.retry_after is None


async def test_group_size_is_not_looked_at(serve: Serve) -> None:
    stub = await serve("lengths")
    await stub.Score(request(sample("a", group_size=4)))
    (result,) = (await stub.Score(request(sample("a", group_size=2)))).results
    assert result.HasField("scored")


async def test_the_description_tells_limits_and_needs(serve: Serve) -> None:
    stub = await serve("with_column", max_samples=7, max_concurrent_calls=3)
    info = await stub.GetRewardInfo(reward_pb2.GetRewardInfoRequest())
    assert info.name == "with_column"
    assert info.version
    assert (info.max_samples, info.max_request_bytes, info.max_concurrent_calls) == (7, 4 << 20, 3)
    assert info.scope == reward_pb2.SCOPE_SAMPLE
    assert list(info.required_metadata) == ["weight"]
    assert not info.needs_token_ids
    assert (await (await serve("by_token")).GetRewardInfo(reward_pb2.GetRewardInfoRequest())).needs_token_ids


async def test_columns_arrive_decoded_with_none_where_a_row_has_no_value(serve: Serve) -> None:
    stub = await serve("record")
    await stub.Score(
        request(
            sample("a", "x", metadata={"stars": "[4, 5]", "author": "7", "rlhf.x": "1", "prompts": "no"}),
            sample("b", "y", metadata={"stars": "null"}),
            json_metadata_keys=["stars", "unused"],
        )
    )
    (call,) = example_rewards.calls
    assert call["stars"] == [[4, 5], None]
    assert call["author"] == ["7", None]
    assert call["prompts"] == ["It is", "It is"]
    assert "rlhf.x" not in call


async def test_chats_arrive_as_messages(serve: Serve) -> None:
    stub = await serve("record")
    messages = [
        reward_pb2.ChatMessage(
            role="user",
            parts=[reward_pb2.ContentPart(text="How "), reward_pb2.ContentPart(text="is it?")],
            extra_json='{"name": "Ann"}',
        )
    ]
    await stub.Score(request(sample("a", messages=messages)))
    (call,) = example_rewards.calls
    assert call["messages"] == [[{"role": "user", "content": "How is it?", "name": "Ann"}]]


async def test_the_first_answer_comes_back_without_a_second_call(serve: Serve) -> None:
    stub = await serve("record")
    first = await stub.Score(request(sample("a", "x")))
    again = await stub.Score(request(sample("a", "x"), sample("b", "y")))
    assert again.results[0] == first.results[0]
    assert [call["completions"] for call in example_rewards.calls] == [["x"], ["y"]]


async def test_the_same_id_with_other_content_fails(serve: Serve) -> None:
    stub = await serve("record")
    await stub.Score(request(sample("a", "x")))
    (clash,) = (await stub.Score(request(sample("a", "y")))).results
    assert clash.failed.code == "SAMPLE_ID_CLASH"
    (other_run,) = (await stub.Score(request(sample("a", "y"), run_id="another"))).results
    assert other_run.HasField("scored")
    (kept,) = (await stub.Score(request(sample("a", "x")))).results
    assert kept.HasField("scored")


async def test_what_is_forgotten_is_judged_again(serve: Serve) -> None:
    stub = await serve("record", remember_samples=1)
    for name in ("a", "b", "a"):
        await stub.Score(request(sample(name)))
    assert len(example_rewards.calls) == 3


async def test_concurrent_duplicates_share_one_computation(serve: Serve) -> None:
    stub = await serve("waits")
    calls = [asyncio.ensure_future(stub.Score(request(sample("a")))) for _ in range(4)]
    await until(lambda: example_rewards.calls)
    (clash,) = (await stub.Score(request(sample("a", "other")))).results
    assert clash.failed.code == "SAMPLE_ID_CLASH"
    example_rewards.gate.set()
    responses = await asyncio.gather(*calls)
    assert all(response == responses[0] for response in responses)
    assert len(example_rewards.calls) == 1


async def test_a_call_is_cut_into_batches(serve: Serve) -> None:
    stub = await serve("record", batch_size=3)
    response = await stub.Score(request(*(sample(str(i)) for i in range(8))))
    assert len(response.results) == 8
    assert [len(call["completions"]) for call in example_rewards.calls] == [3, 3, 2]


async def test_a_plain_function_runs_one_call_at_a_time_and_the_loop_stays_alive(serve: Serve) -> None:
    stub = await serve("waits")
    calls = [asyncio.ensure_future(stub.Score(request(sample(name)))) for name in ("a", "b")]
    await until(lambda: example_rewards.calls)
    await stub.GetRewardInfo(reward_pb2.GetRewardInfoRequest())
    assert len(example_rewards.calls) == 1
    example_rewards.gate.set()
    await asyncio.gather(*calls)


async def test_more_threads_run_more_calls(serve: Serve) -> None:
    stub = await serve("waits", threads=2)
    calls = [asyncio.ensure_future(stub.Score(request(sample(name)))) for name in ("a", "b")]
    await until(lambda: len(example_rewards.calls) == 2)
    example_rewards.gate.set()
    await asyncio.gather(*calls)


async def test_a_full_queue_pushes_back_with_a_time_to_come_back(serve: Serve) -> None:
    stub = await serve("waits", max_queue_samples=2)
    first = asyncio.ensure_future(stub.Score(request(sample("a"), sample("b"))))
    await until(lambda: example_rewards.calls)
    refused = await failure(stub.Score(request(sample("c"))))
    assert refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert refused.reason == "OVERLOADED"
    assert refused.retry_after is not None
    assert refused.retry_after > 0
    # What waits already is no new load.
    again = asyncio.ensure_future(stub.Score(request(sample("a"))))
    example_rewards.gate.set()
    await asyncio.gather(first, again)
    assert (await stub.Score(request(sample("c")))).results[0].HasField("scored")


async def test_a_call_larger_than_the_queue_gets_in_when_the_queue_is_empty(serve: Serve) -> None:
    stub = await serve("lengths", max_queue_samples=2)
    assert len((await stub.Score(request(*(sample(str(i)) for i in range(5))))).results) == 5


async def test_what_takes_longer_than_the_deadline_is_pending_and_is_judged_once(serve: Serve) -> None:
    stub = await serve("waits", batch_size=1)
    # A tenth of the deadline is left to bring the answer back, which a busy machine may use up.
    response = await call_with_retry(
        lambda: stub.Score(request(sample("a"), sample("b")), timeout=3), policy=RetryPolicy(attempts=5), what="server"
    )
    assert outcomes(response) == {"a": "pending", "b": "pending"}
    assert all(result.pending.retry_after.ToTimedelta().total_seconds() > 0 for result in response.results)
    example_rewards.gate.set()
    response = await stub.Score(request(sample("a"), sample("b")), timeout=10)
    assert outcomes(response) == {"a": "scored", "b": "scored"}
    assert len(example_rewards.calls) == 2


async def test_an_answer_that_nobody_waited_for_is_kept(serve: Serve) -> None:
    stub = await serve("waits")
    call = asyncio.ensure_future(stub.Score(request(sample("a"))))
    await until(lambda: example_rewards.calls)
    call.cancel()
    example_rewards.gate.set()
    (result,) = (await stub.Score(request(sample("a")))).results
    assert result.HasField("scored")
    assert len(example_rewards.calls) == 1


async def test_an_async_function_is_cancelled_with_its_only_caller(serve: Serve) -> None:
    stub = await serve("asynchronous_forever")
    call = stub.Score(request(sample("a")))
    waiting = asyncio.ensure_future(call)
    await until(lambda: example_rewards.calls)
    waiting.cancel()
    await until(example_rewards.async_cancelled.is_set)


async def test_a_cancelled_call_does_not_take_another_with_it(serve: Serve) -> None:
    stub = await serve("waits")
    first = asyncio.ensure_future(stub.Score(request(sample("a"))))
    await until(lambda: example_rewards.calls)
    second = asyncio.ensure_future(stub.Score(request(sample("a"))))
    first.cancel()
    await asyncio.sleep(0)
    example_rewards.gate.set()
    assert (await second).results[0].HasField("scored")


async def test_vader_prefers_praise(serve: Serve) -> None:
    stub = await serve("vader")
    good, bad = (
        await stub.Score(request(sample("a", " a wonderful, great film"), sample("b", " a terrible, awful mess")))
    ).results
    assert good.scored.reward > 0.8
    assert bad.scored.reward < -0.6


async def test_a_function_that_names_group_ids_gets_whole_groups(serve: Serve) -> None:
    stub = await serve("ranks", batch_size=2)
    info = await stub.GetRewardInfo(reward_pb2.GetRewardInfoRequest())
    assert info.scope == reward_pb2.SCOPE_GROUP
    group = [sample(f"a{n}", "x" * n, group_id="a", group_size=3) for n in range(3)]
    alone = sample("b", "xx", group_id="b")
    response = await stub.Score(request(group[2], alone, group[0], group[1]))
    rewards = {result.sample_id: result.scored.reward for result in response.results}
    assert rewards == {"a0": 0.0, "a1": 1.0, "a2": 2.0, "b": 0.0}
    assert sorted(len(call["completions"]) for call in example_rewards.calls) == [1, 3]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("samples", "path"),
    [
        ([sample("a", group_size=2)], "samples[0].group_size"),
        ([sample("a"), sample("b", group_size=2)], "samples[0].group_size"),
        ([sample("a", group_size=2), sample("b", group_size=3)], "samples[1].group_size"),
    ],
)
async def test_a_part_of_a_group_is_refused_by_a_reward_that_compares(
    serve: Serve, samples: list[reward_pb2.Sample], path: str
) -> None:
    stub = await serve("ranks")
    refused = await failure(stub.Score(request(*samples)))
    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
    assert path in [violation.field for violation in refused.violations]


async def test_a_sample_that_fails_takes_its_group_with_it_and_no_other(serve: Serve) -> None:
    stub = await serve("ranks")
    response = await stub.Score(
        request(
            sample("a", group_id="a", group_size=2, metadata={"k": "{"}),
            sample("b", group_id="a", group_size=2),
            sample("c", group_id="c"),
            json_metadata_keys=["k"],
        )
    )
    assert outcomes(response) == {"a": "failed", "b": "failed", "c": "scored"}
    by_id = {result.sample_id: result for result in response.results}
    assert by_id["b"].failed.code == "INVALID_METADATA"
    assert "another sample of the group" in by_id["b"].failed.message
