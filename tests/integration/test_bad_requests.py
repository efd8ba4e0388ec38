"""A thousand random mistakes over every RPC: each gets what the contract promises, and nobody else notices."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf.failures import from_rpc_error
from rlhf.policy.v1 import policy_pb2, policy_pb2_grpc
from rlhf.reward.v1 import reward_pb2, reward_pb2_grpc
from rlhf.weights.v1 import weights_pb2, weights_pb2_grpc
from tests.integration.bad_requests import BadRequest, Limits, bad_requests
from tests.support.memory import private_bytes
from tests.support.models import make_tiny_gpt2
from tests.support.processes import ProcessUnderTest, process_factory, wait_for

REQUESTS = 1000
WARM_UP = 500
ALLOWED_GROWTH = 8 << 20
"""Bytes by which a server may grow over the second half: 16 KiB for each of its requests."""

WIDTH = 32


@dataclass
class Target:
    """Two servers and what is sent to them."""

    policy: ProcessUnderTest
    reward: ProcessUnderTest
    stubs: dict[str, Any]
    limits: Limits

    def send(self, bad: BadRequest) -> None:
        """Raises grpc.RpcError with what the server answered."""
        call = self.stubs[bad.rpc]
        if bad.rpc == "UpdateWeights":
            call(iter(bad.messages), timeout=30)
        elif bad.rpc == "StreamGenerate":
            list(call(bad.messages[0], timeout=30))
        else:
            call(bad.messages[0], timeout=30)

    def memory(self) -> dict[str, int]:
        """Resident bytes of each server."""
        return {str(process): private_bytes(process.pid) for process in (self.policy, self.reward)}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    folder = make_tiny_gpt2(tmp_path_factory.mktemp("model"), width=WIDTH)
    scratch = tmp_path_factory.mktemp("processes")
    with ExitStack() as stack:
        start = stack.enter_context(process_factory(scratch))
        policy = start("policy_server", "--model", str(folder), "--reproducible", "--weights-root", str(scratch))
        reward = start("reward_server", "--reward", "length", "--reward-options", '{"target": 8}')
        policy.wait_serving("rlhf.policy.v1.PolicyService")
        reward.wait_serving("rlhf.reward.v1.RewardService")
        to_policy = stack.enter_context(grpc.insecure_channel(policy.address))
        to_reward = stack.enter_context(grpc.insecure_channel(reward.address))
        generating = policy_pb2_grpc.PolicyServiceStub(to_policy)
        writing = weights_pb2_grpc.WeightsServiceStub(to_policy)
        scoring = reward_pb2_grpc.RewardServiceStub(to_reward)
        model = generating.GetModel(policy_pb2.GetModelRequest())
        yield Target(
            policy,
            reward,
            stubs={
                **{name: getattr(generating, name) for name in ("Generate", "StreamGenerate", "LogProbs", "GetModel")},
                **{name: getattr(writing, name) for name in ("UpdateWeights", "GetWeights")},
                **{name: getattr(scoring, name) for name in ("Score", "GetRewardInfo")},
            },
            limits=Limits(
                vocab_size=model.vocab_size,
                max_context_tokens=model.max_context_tokens,
                max_completions=model.max_completions,
                max_samples=scoring.GetRewardInfo(reward_pb2.GetRewardInfoRequest()).max_samples,
                parameter="transformer.ln_f.weight",
                parameter_shape=(WIDTH,),
                total_bytes=4 * WIDTH,
            ),
        )


class Bystander:
    """Well-behaved calls, one after another, each compared with the answer that the quiet server gave."""

    def __init__(self, target: Target) -> None:
        self.calls = 0
        self.failure: BaseException | None = None
        self._target = target
        self._expected = self._ask()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _ask(self) -> tuple[Any, ...]:
        stubs = self._target.stubs
        request = policy_pb2.GenerateRequest(
            prompt=policy_pb2.Prompt(text="The film"),
            sampling=policy_pb2.SamplingParams(max_new_tokens=60, min_new_tokens=60, seed=7),
            logprobs=[policy_pb2.LOG_PROB_KIND_PROCESSED],
        )
        generated = stubs["Generate"](request, timeout=60)
        stream = stubs["StreamGenerate"](policy_pb2.StreamGenerateRequest(request=request), timeout=60)
        streamed = [token for message in stream for token in message.delta.token_ids]
        completion = policy_pb2.Sequence(
            prompt_token_ids=generated.prompt_token_ids, completion_token_ids=generated.completions[0].token_ids
        )
        judged = stubs["LogProbs"](policy_pb2.LogProbsRequest(sequences=[completion]), timeout=60)
        scored = stubs["Score"](
            reward_pb2.ScoreRequest(
                run_id="bystander",
                samples=[reward_pb2.Sample(sample_id="1", group_id="1", prompt="The film", completion=" is long")],
            ),
            timeout=60,
        )
        return generated, streamed, judged, scored

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                assert self._ask() == self._expected, "an answer changed under bad requests"
                self.calls += 1
        except BaseException as error:
            self.failure = error

    def __enter__(self) -> Bystander:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()


def test_a_thousand_bad_requests_get_their_codes_and_disturb_nobody(target: Target) -> None:
    sent = 0
    memory_after_warm_up: dict[str, int] = {}
    # Hypothesis stops its first phase at WARM_UP examples: memory is compared from there on.
    for examples in (WARM_UP, REQUESTS - WARM_UP):

        @settings(
            max_examples=examples,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(bad=bad_requests(target.limits))
        def attack(bad: BadRequest) -> None:
            nonlocal sent
            sent += 1
            with pytest.raises(grpc.RpcError) as raised:
                target.send(bad)
            failure = from_rpc_error(raised.value)
            assert failure.code is bad.code, f"{failure.code.name}: {failure.message}"
            paths = [violation.field for violation in failure.violations]
            if bad.path is not None:
                assert bad.path in paths, failure.message
            else:
                assert failure.reason, failure.message

        with Bystander(target) as bystander:
            attack()
            wait_for(lambda b=bystander: b.calls or b.failure, within=60, what="call of the bystander")
        if bystander.failure is not None:
            raise bystander.failure
        if not memory_after_warm_up:
            memory_after_warm_up = target.memory()
    assert sent >= REQUESTS
    for process, before in memory_after_warm_up.items():
        assert target.memory()[process] - before < ALLOWED_GROWTH, f"{process} grew"


@settings(max_examples=50, database=None, suppress_health_check=list(HealthCheck))
@given(noise=st.binary(max_size=200), rpc=st.sampled_from(["Generate", "LogProbs", "GetWeights"]))
def test_bytes_that_are_no_message_do_not_end_a_server(target: Target, noise: bytes, rpc: str) -> None:
    service = "weights.v1.WeightsService" if rpc == "GetWeights" else "policy.v1.PolicyService"
    with grpc.insecure_channel(target.policy.address) as channel:
        call = channel.unary_unary(f"/rlhf.{service}/{rpc}", request_serializer=bytes, response_deserializer=bytes)
        with suppress(grpc.RpcError):  # some noise is a message, some is even a valid request
            call(noise, timeout=30)
    assert target.stubs["GetWeights"](weights_pb2.GetWeightsRequest(), timeout=30).server_instance_id
