"""Rollouts: what is asked of whom, and in which order, whatever finishes first."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog

from rlhf.channel import RetryPolicy, Waiting
from rlhf.failures import unavailable
from rlhf.policy.v1 import policy_pb2
from rlhf.reward.v1 import reward_pb2
from tests.trainer.servers import ScriptedPolicy, ScriptedReward, completed, reached, scored, serving
from trainer.clients.policy import BrokenServerError, PolicyClient
from trainer.clients.rewards import RewardClient, Scored
from trainer.clients.waits import CallWatch
from trainer.run.journal import Journal
from trainer.run.prompts import Prompt, Record
from trainer.run.rollouts import Rollout, RolloutCollector, Sampling
from trainer.versions import WeightsVersion

FAST = RetryPolicy(initial=0.001, maximum=0.01)
WEIGHTS = WeightsVersion("run", 1, 2)


def prompts(count: int) -> list[Prompt]:
    texts = [f"prompt {row}" for row in range(count)]
    return [Prompt(Record(row, text, {"row": str(row)}), text, (100 * row + 1,)) for row, text in enumerate(texts)]


@contextlib.asynccontextmanager
async def collector_of(
    policy: ScriptedPolicy,
    reward: ScriptedReward,
    watch: CallWatch | None = None,
    journal: Path | None = None,
) -> AsyncIterator[RolloutCollector]:
    async with contextlib.AsyncExitStack() as stack:
        policy_address = await stack.enter_async_context(serving(policy.add_to))
        reward_address = await stack.enter_async_context(serving(reward.add_to))
        file = journal or Path(stack.enter_context(tempfile.TemporaryDirectory())) / "journal.jsonl"
        kept = await stack.enter_async_context(contextlib.aclosing(Journal(file, reward_version="1")))
        policy_client = PolicyClient(policy_address, retry=FAST, watch=watch)
        rewards = RewardClient(reward_address, run_id="run", retry=FAST, watch=watch)
        try:
            await rewards.pin()
            yield RolloutCollector(
                policy_client,
                rewards,
                kept,
                run_id="run",
                sampling=Sampling(temperature=0.7, max_new_tokens=8),
                concurrency=4,
                served_reference=True,
            )
        finally:
            await policy_client.close()
            await rewards.close()


async def collect(collector: RolloutCollector, count: int, name: str = "1", **options: Any) -> list[Rollout]:
    """All rollouts but those of stragglers, which only `enough` makes."""
    rollouts = await collector.collect(
        prompts(count),
        name=name,
        step=1,
        seeds=range(count),
        weights=WEIGHTS,
        on_generated=lambda done, of: None,
        **options,
    )
    return [rollout for rollout in rollouts if rollout is not None]


async def test_rollouts_come_in_the_order_of_the_prompts_with_their_own_rewards() -> None:
    def by_row(request: reward_pb2.ScoreRequest) -> reward_pb2.ScoreResponse:
        results = [
            reward_pb2.SampleResult(
                sample_id=sample.sample_id, scored=reward_pb2.Scored(reward=float(sample.metadata["row"]))
            )
            for sample in request.samples
        ]
        return reward_pb2.ScoreResponse(results=results[::-1])

    async with collector_of(ScriptedPolicy(completed), ScriptedReward(by_row)) as collector:
        rollouts = await collect(collector, 20)

    assert [rollout.prompt.text for rollout in rollouts] == [f"prompt {row}" for row in range(20)]
    assert [rollout.outcome for rollout in rollouts] == [Scored(float(row)) for row in range(20)]
    assert [rollout.generation.token_ids[0] for rollout in rollouts] == [100 * row + 2 for row in range(20)]
    assert all(rollout.reference_logprobs == (-0.5, -0.5, -0.5) for rollout in rollouts)


async def test_reference_calls_group_rows_by_number_so_that_timing_changes_no_bits() -> None:
    policy = ScriptedPolicy(completed)

    async with collector_of(policy, ScriptedReward(scored)) as collector:
        await collect(collector, 20)

    first_tokens = sorted([sequence.prompt_token_ids[0] for sequence in call.sequences] for call in policy.scored)
    assert first_tokens == [[100 * row + 1 for row in range(16)], [100 * row + 1 for row in range(16, 20)]]
    assert {call.model for call in policy.scored} == {"reference"}
    assert {round(call.temperature, 6) for call in policy.scored} == {0.7}


async def test_reference_calls_keep_to_the_servers_limits_whatever_the_completions_come_to() -> None:
    policy = ScriptedPolicy(completed)
    policy.model.max_log_probs_tokens = 30  # a row may come to 1 + 8 tokens

    async with collector_of(policy, ScriptedReward(scored)) as collector:
        rollouts = await collect(collector, 7)

    assert sorted(len(call.sequences) for call in policy.scored) == [1, 3, 3]
    assert all(rollout.reference_logprobs == (-0.5, -0.5, -0.5) for rollout in rollouts)


async def test_sample_ids_change_with_the_tokens_and_only_with_them() -> None:
    async def ids(tokens: int) -> list[str]:
        policy = ScriptedPolicy(lambda request: completed(request, tokens=tokens))
        async with collector_of(policy, ScriptedReward(scored)) as collector:
            return [rollout.sample_id for rollout in await collect(collector, 3)]

    first, again, other = await ids(3), await ids(3), await ids(4)

    assert first == again
    assert len({*first, *other}) == 6
    assert all(sample_id.startswith(f"run/1/{row}/") for row, sample_id in enumerate(first))


async def test_servers_are_told_run_step_and_a_request_id_of_its_own_for_their_log_lines() -> None:
    policy, reward = ScriptedPolicy(completed), ScriptedReward(scored, max_samples=3)

    async with collector_of(policy, reward) as collector:
        await collect(collector, 3)
        await collect(collector, 3, name="evaluation-1")

    told = [*policy.metadata, *reward.metadata]
    assert {(each["x-rlhf-run-id"], each["x-rlhf-step"]) for each in told} == {("run", "1")}
    asked = [each["x-request-id"] for each in policy.metadata]
    assert len(set(asked)) == len(asked)
    assert {"1-0", "1-2", "1-reference-0", "evaluation-1-0", "evaluation-1-reference-0"} <= set(asked)
    assert all(each["x-request-id"].startswith(("1-", "evaluation-1-")) for each in reward.metadata)


async def test_waiting_lines_name_the_request() -> None:
    seen: list[object] = []

    class Watch:
        def waiting(self, call: object, waiting: Waiting) -> None:
            seen.append(structlog.contextvars.get_contextvars().get("request_id"))

        def over(self, call: object) -> None:
            pass

    policy, reward = ScriptedPolicy(unavailable("away"), completed), ScriptedReward(grpc.StatusCode.UNAVAILABLE, scored)

    async with collector_of(policy, reward, watch=Watch()) as collector:
        await collect(collector, 1)

    assert seen == ["1-0", "1-0"]


async def test_what_was_judged_before_a_restart_is_asked_of_nobody_and_the_rest_is(tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    async with collector_of(ScriptedPolicy(completed), ScriptedReward(scored), journal=journal) as collector:
        before = await collect(collector, 3)
    reward = ScriptedReward(lambda request: scored(request, 2.0))

    async with collector_of(ScriptedPolicy(completed), reward, journal=journal) as collector:
        after = await collect(collector, 5)

    assert [rollout.outcome for rollout in after] == [*(rollout.outcome for rollout in before), *[Scored(2.0)] * 2]
    asked = [sample.prompt for call in reward.calls for sample in call.samples]
    assert sorted(asked) == ["prompt 3", "prompt 4"]


async def test_a_completion_without_tokens_is_judged_by_nobody() -> None:
    reward = ScriptedReward(scored)
    policy = ScriptedPolicy(lambda request: completed(request, tokens=0))

    async with collector_of(policy, reward) as collector:
        (rollout,) = await collect(collector, 1)

    assert (rollout.outcome, rollout.reference_logprobs) == (None, None)
    assert reward.calls == policy.scored == []


async def test_an_aborted_completion_is_asked_for_again() -> None:
    def aborted(request: policy_pb2.GenerateRequest) -> policy_pb2.GenerateResponse:
        return completed(request, tokens=1, finish=policy_pb2.FINISH_REASON_ABORTED)

    policy = ScriptedPolicy(aborted, aborted, completed)

    async with collector_of(policy, ScriptedReward(scored)) as collector:
        (rollout,) = await collect(collector, 1)

    assert len(rollout.generation.token_ids) == 3
    assert policy.calls[0] == policy.calls[2]


async def test_tokens_of_other_weights_never_become_a_rollout() -> None:
    def stale(request: policy_pb2.GenerateRequest) -> policy_pb2.GenerateResponse:
        response = completed(request)
        response.completions[0].spans[0].weights.version = 1
        return response

    async with collector_of(ScriptedPolicy(stale), ScriptedReward(scored)) as collector:
        with pytest.raises(BrokenServerError, match="sampled row 0 with version 1"):
            await collect(collector, 1)


async def test_later_weights_will_do_where_they_are_allowed_and_earlier_ones_never() -> None:
    def sampled_with(*versions: int) -> Any:
        def answer(request: policy_pb2.GenerateRequest) -> policy_pb2.GenerateResponse:
            response = completed(request, tokens=len(versions))
            spans = [
                policy_pb2.VersionSpan(weights=WeightsVersion("run", 1, version).to_proto(), token_count=1)
                for version in versions
            ]
            del response.completions[0].spans[:]
            response.completions[0].spans.extend(spans)
            return response

        return answer

    async with collector_of(ScriptedPolicy(sampled_with(2, 3)), ScriptedReward(scored)) as collector:
        (rollout,) = await collect(collector, 1, or_later=True)
        with pytest.raises(BrokenServerError, match=r"was asked for version 2 .* sampled row 0 with version 3"):
            await collect(collector, 1)
    assert [version.version for version in rollout.generation.versions] == [2, 3]

    async with collector_of(ScriptedPolicy(sampled_with(1, 2)), ScriptedReward(scored)) as collector:
        with pytest.raises(BrokenServerError, match="or later and sampled row 0 with version 1"):
            await collect(collector, 1, or_later=True)


async def test_once_enough_are_scored_the_stragglers_are_cancelled_wherever_they_are() -> None:
    """Row 1 is never generated, row 2 never scored, row 3 fails, and the others come through."""

    class Slow(ScriptedPolicy):
        async def Generate(  # noqa: N802
            self, request: policy_pb2.GenerateRequest, context: grpc.aio.ServicerContext
        ) -> policy_pb2.GenerateResponse:
            if request.prompt.token_ids.ids[0] == 101:
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.Event().wait()
                cancelled.append(request)
            return await super().Generate(request, context)

    def never_two(request: reward_pb2.ScoreRequest) -> reward_pb2.ScoreResponse:
        response = scored(request)
        for sample, result in zip(request.samples, response.results, strict=True):
            if sample.metadata["row"] == "2":
                result.pending.retry_after.FromSeconds(1000)
            if sample.metadata["row"] == "3":
                result.failed.code = "NO"
        return response

    cancelled: list[policy_pb2.GenerateRequest] = []
    policy = Slow(completed)
    async with collector_of(policy, ScriptedReward(never_two)) as collector:
        rollouts = await collect(collector, 8, enough=4)
        await reached(lambda: bool(cancelled))

    rows = {rollout.row: rollout for rollout in rollouts}
    assert rows.keys().isdisjoint({1, 2})
    kept = [rollout for rollout in rollouts if isinstance(rollout.outcome, Scored)]
    assert len(kept) == 4
    assert all(rollout.reference_logprobs == (-0.5, -0.5, -0.5) for rollout in rollouts)
    assert len(cancelled) == 1


async def test_the_first_final_error_ends_the_collection_and_leaves_nothing_running() -> None:
    reward = ScriptedReward(grpc.StatusCode.UNIMPLEMENTED)

    async with collector_of(ScriptedPolicy(completed), reward) as collector:
        with pytest.raises(Exception, match="UNIMPLEMENTED"):
            await collect(collector, 10)
