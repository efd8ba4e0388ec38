"""PolicyClient against servers that fail for a while, lose their weights, or answer what the contract forbids."""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncIterator, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.channel import RetryPolicy
from rlhf.failures import RpcFailure, invalid_argument, overloaded, unavailable, weights_behind
from rlhf.policy.v1 import policy_pb2
from tests.trainer.servers import ScriptedPolicy, completed, serving
from trainer.clients.policy import BrokenServerError, FinishReason, Generation, ModelInfo, PolicyClient
from trainer.versions import WeightsVersion

FAST = RetryPolicy(initial=0.001, maximum=0.01)
WEIGHTS = WeightsVersion("run", 1, 4)


@contextlib.asynccontextmanager
async def client_of(server: ScriptedPolicy, **options: object) -> AsyncIterator[PolicyClient]:
    async with serving(server.add_to) as address:
        client = PolicyClient(address, retry=FAST, timeout=5.0, **options)  # type: ignore[arg-type]
        try:
            yield client
        finally:
            await client.close()


async def generate(client: PolicyClient) -> Generation:
    (generation,) = await client.generate([7, 8], seed=5, temperature=0.5, max_new_tokens=4, weights=WEIGHTS)
    return generation


async def test_the_request_says_everything_and_nothing_more() -> None:
    server = ScriptedPolicy(completed)

    async with client_of(server) as client:
        generation = await generate(client)

    assert generation == Generation((9, 10, 11), (-1.0,) * 3, "9 10 11", FinishReason.EOS, 5, (WEIGHTS,))
    (request,) = server.calls
    assert {field.name for field, _ in request.sampling.ListFields()} == {"temperature", "max_new_tokens", "seed", "n"}
    assert request.weights.exact == WEIGHTS.to_proto()
    assert list(request.logprobs) == [policy_pb2.LOG_PROB_KIND_PROCESSED]


async def test_a_passing_failure_is_waited_out_and_the_server_brought_back_before_each_new_attempt() -> None:
    recovered = 0

    async def recover() -> None:
        nonlocal recovered
        recovered += 1

    server = ScriptedPolicy(unavailable("draining"), overloaded("full", 0.001), completed)

    async with client_of(server, recover=recover) as client:
        await generate(client)

    assert len(server.calls) == 3
    assert recovered == 2


async def test_lost_weights_are_published_again_and_the_same_request_is_sent_again() -> None:
    recovered = 0

    async def recover() -> None:
        nonlocal recovered
        recovered += 1

    server = ScriptedPolicy(weights_behind("still the first ones"), completed)

    async with client_of(server, recover=recover) as client:
        await generate(client)

    assert server.calls[0] == server.calls[1]
    assert recovered == 1


async def test_weights_that_stay_lost_end_in_the_servers_answer() -> None:
    async def recover() -> None:
        pass

    async with client_of(ScriptedPolicy(weights_behind("as scripted")), recover=recover) as client:
        with pytest.raises(RpcFailure, match="as scripted"):
            await generate(client)


async def test_a_mistake_of_ours_is_raised_at_once() -> None:
    server = ScriptedPolicy(invalid_argument("sampling.temperature", "must be at least 0"))

    async with client_of(server) as client:
        with pytest.raises(RpcFailure, match=r"sampling\.temperature"):
            await generate(client)

    assert len(server.calls) == 1


def change(alter: Callable[[policy_pb2.Completion], None]) -> Callable[..., policy_pb2.GenerateResponse]:
    def answer(request: policy_pb2.GenerateRequest) -> policy_pb2.GenerateResponse:
        response = completed(request)
        alter(response.completions[0])
        return response

    return answer


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (lambda each: setattr(each, "index", 1), "did not answer completions 0 to 0"),
        (lambda each: each.processed_logprobs.pop(), "one finite log-probability per token"),
        (lambda each: each.processed_logprobs.__setitem__(0, math.nan), "one finite log-probability per token"),
        (lambda each: setattr(each.spans[0], "token_count", 2), "do not tile the tokens"),
        (
            lambda each: (each.token_ids.extend([1, 2]), each.processed_logprobs.extend([-1.0, -1.0])),
            "more than 4 tokens",
        ),
    ],
)
async def test_what_the_contract_forbids_is_named(alter: Callable[[policy_pb2.Completion], None], message: str) -> None:
    async with client_of(ScriptedPolicy(change(alter))) as client:
        with pytest.raises(BrokenServerError, match=message):
            await generate(client)


@given(
    lengths=st.lists(st.integers(2, 2**21), max_size=40),
    most_tokens=st.integers(0, 2**21),
    most_bytes=st.integers(4 << 20, 128 << 20),
)
def test_log_probs_calls_hold_every_row_once_in_order_within_the_limits(
    lengths: list[int], most_tokens: int, most_bytes: int
) -> None:
    model = info(max_log_probs_tokens=most_tokens, max_message_bytes=most_bytes)

    groups = list(model.log_probs_groups(lengths, rows=16))

    assert [row for group in groups for row in group] == list(range(len(lengths)))
    for group in (group for group in groups if len(group) > 1):
        assert len(group) <= 16
        assert not most_tokens or sum(lengths[row] for row in group) <= most_tokens
        assert sum(lengths[row] for row in group) * 5 <= min(most_bytes, 64 << 20)  # an id takes up to 5 bytes


def info(**limits: int) -> ModelInfo:
    return ModelInfo(
        model="reference",
        weights=WeightsVersion(),
        weights_digest="",
        serving_dtype="float32",
        tokenizer_digest="",
        vocab_size=257,
        eos_token_ids=(),
        max_context_tokens=2**21,
        processed_logprobs=True,
        **limits,
    )


async def test_log_probabilities_must_be_finite() -> None:
    async with client_of(ScriptedPolicy(completed, logprob=math.nan)) as client:
        with pytest.raises(BrokenServerError, match="not finite"):
            await client.log_probs("reference", [([1], [2, 3])])
