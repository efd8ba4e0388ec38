"""Small servers over real sockets that do what a test tells them to, where a real server never would."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
from safetensors.torch import load_file

from rlhf.channel import REQUEST_ID_KEY, RUN_ID_KEY, STEP_KEY
from rlhf.failures import RpcFailure, to_status
from rlhf.policy.v1 import policy_pb2, policy_pb2_grpc
from rlhf.reward.v1 import reward_pb2, reward_pb2_grpc
from rlhf.tensors import byte_view, xxh3_64
from rlhf.weights.v1 import weights_pb2, weights_pb2_grpc

Score = Callable[[reward_pb2.ScoreRequest], reward_pb2.ScoreResponse]

SOON = 10.0
"""Seconds."""


@contextlib.asynccontextmanager
async def serving(add: Callable[[grpc.aio.Server], None], *, port: int = 0) -> AsyncIterator[str]:
    """Run a server for as long as the context lasts; the value is its address."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    add(server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        yield f"127.0.0.1:{bound}"
    finally:
        await server.stop(0)


async def reached(condition: Callable[[], bool]) -> None:
    """Until what a server does by itself is done."""
    async with asyncio.timeout(SOON):
        while not condition():  # noqa: ASYNC110 - what changes lies in servers, which tell nobody
            await asyncio.sleep(0.005)


def _told(context: grpc.aio.ServicerContext) -> dict[str, str]:
    """What the caller says of itself for log lines."""
    metadata: Any = context.invocation_metadata()
    return {key: value for key, value in metadata if key in (RUN_ID_KEY, STEP_KEY, REQUEST_ID_KEY)}


class ScriptedReward(reward_pb2_grpc.RewardServiceServicer):
    """Answers Score calls by `scripts`, one after the other; the last answers all further calls."""

    def __init__(self, *scripts: Score | grpc.StatusCode, **info: Any) -> None:
        self.info = reward_pb2.GetRewardInfoResponse(**{"name": "scripted", "version": "1", **info})
        self.calls: list[reward_pb2.ScoreRequest] = []
        self.metadata: list[dict[str, str]] = []
        self._scripts = list(scripts)

    async def Score(  # noqa: N802
        self, request: reward_pb2.ScoreRequest, context: grpc.aio.ServicerContext
    ) -> reward_pb2.ScoreResponse:
        self.calls.append(request)
        self.metadata.append(_told(context))
        script = self._scripts.pop(0) if len(self._scripts) > 1 else self._scripts[0]
        if isinstance(script, grpc.StatusCode):
            await context.abort(script, "as scripted")
            raise AssertionError("abort raises")
        return script(request)

    async def GetRewardInfo(  # noqa: N802
        self, request: reward_pb2.GetRewardInfoRequest, context: grpc.aio.ServicerContext
    ) -> reward_pb2.GetRewardInfoResponse:
        return self.info

    def add_to(self, server: grpc.aio.Server) -> None:
        reward_pb2_grpc.add_RewardServiceServicer_to_server(self, server)


def scored(request: reward_pb2.ScoreRequest, reward: float = 1.0) -> reward_pb2.ScoreResponse:
    """Every sample gets `reward`."""
    results = [
        reward_pb2.SampleResult(sample_id=sample.sample_id, scored=reward_pb2.Scored(reward=reward))
        for sample in request.samples
    ]
    return reward_pb2.ScoreResponse(results=results)


Change = Callable[[reward_pb2.SampleResult], None]


def altered(change: Change) -> Callable[[reward_pb2.ScoreRequest], reward_pb2.ScoreResponse]:
    """A good answer with its first result changed."""

    def answer(request: reward_pb2.ScoreRequest) -> reward_pb2.ScoreResponse:
        response = scored(request)
        change(response.results[0])
        return response

    return answer


def set_reward(value: float) -> Change:
    def change(result: reward_pb2.SampleResult) -> None:
        result.scored.reward = value

    return change


Generate = Callable[[policy_pb2.GenerateRequest], policy_pb2.GenerateResponse]


class ScriptedPolicy(policy_pb2_grpc.PolicyServiceServicer):
    """Completes by `scripts`, one after the other, the last again and again; every log-probability is `logprob`."""

    def __init__(self, *scripts: Generate | RpcFailure, logprob: float = -0.5) -> None:
        self.calls: list[policy_pb2.GenerateRequest] = []
        self.scored: list[policy_pb2.LogProbsRequest] = []
        self.metadata: list[dict[str, str]] = []
        self.logprob = logprob
        self.model = policy_pb2.GetModelResponse(
            model="policy",
            weights_digest="xxh3_128:aa",
            serving_dtype="float32",
            tokenizer_digest="sha256:bb",
            vocab_size=257,
            max_context_tokens=128,
            logprobs=[policy_pb2.LOG_PROB_KIND_RAW, policy_pb2.LOG_PROB_KIND_PROCESSED],
        )
        self._scripts = list(scripts)

    async def Generate(  # noqa: N802
        self, request: policy_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> policy_pb2.GenerateResponse:
        self.calls.append(request)
        self.metadata.append(_told(context))
        script = self._scripts.pop(0) if len(self._scripts) > 1 else self._scripts[0]
        if isinstance(script, RpcFailure):
            code, message, trailers = to_status(script)
            await context.abort(code, message, trailers)
            raise AssertionError("abort raises")
        return script(request)

    async def LogProbs(  # noqa: N802
        self, request: policy_pb2.LogProbsRequest, context: grpc.aio.ServicerContext
    ) -> policy_pb2.LogProbsResponse:
        self.scored.append(request)
        self.metadata.append(_told(context))
        return policy_pb2.LogProbsResponse(
            sequences=[
                policy_pb2.SequenceLogProbs(logprobs=[self.logprob] * len(sequence.completion_token_ids))
                for sequence in request.sequences
            ]
        )

    async def GetModel(  # noqa: N802
        self, request: policy_pb2.GetModelRequest, context: grpc.aio.ServicerContext
    ) -> policy_pb2.GetModelResponse:
        return self.model

    def add_to(self, server: grpc.aio.Server) -> None:
        policy_pb2_grpc.add_PolicyServiceServicer_to_server(self, server)


def completed(
    request: policy_pb2.GenerateRequest,
    *,
    tokens: int = 3,
    finish: policy_pb2.FinishReason = policy_pb2.FINISH_REASON_EOS,
) -> policy_pb2.GenerateResponse:
    """`tokens` tokens that count up from the prompt's last one, under the weights asked for."""
    ids = [request.prompt.token_ids.ids[-1] + 1 + number for number in range(tokens)]
    span = policy_pb2.VersionSpan(weights=request.weights.exact, token_count=tokens)
    completion = policy_pb2.Completion(
        token_ids=ids,
        text=" ".join(map(str, ids)),
        finish_reason=finish,
        processed_logprobs=[-1.0] * tokens,
        spans=[span] if tokens else [],
        seed=request.sampling.seed,
    )
    return policy_pb2.GenerateResponse(prompt_token_ids=request.prompt.token_ids.ids, completions=[completion])


class MemoryWeights(weights_pb2_grpc.WeightsServiceServicer):
    """Keeps what is published as bytes by name, and cuts streams or loses answers when told to.

    root: it reads files below.
    """

    def __init__(
        self, *, instance: str = "first", live: policy_pb2.WeightsVersion | None = None, root: Path | None = None
    ) -> None:
        self.root = root
        self.instance = instance
        self.live = live or policy_pb2.WeightsVersion()
        self.tensors: dict[str, bytes] = {}
        self.updates: list[weights_pb2.Begin] = []
        self.fail_after_begin: list[grpc.StatusCode | RpcFailure] = []
        self.lose_answer: list[grpc.StatusCode] = []
        self._states: dict[str, int] = {}

    async def UpdateWeights(  # noqa: N802
        self, request_iterator: AsyncIterator[weights_pb2.UpdateWeightsRequest], context: grpc.aio.ServicerContext
    ) -> weights_pb2.UpdateWeightsResponse:
        begin: weights_pb2.Begin | None = None
        specs: list[weights_pb2.TensorSpec] = []
        data: dict[int, bytearray] = {}
        async for message in request_iterator:
            match message.WhichOneof("message"):
                case "begin":
                    begin = message.begin
                    self.updates.append(begin)
                    if self.fail_after_begin:
                        failure = self.fail_after_begin.pop(0)
                        # A server that answers while its caller still sends may be heard as INTERNAL.
                        async for _ in request_iterator:
                            pass
                        if isinstance(failure, RpcFailure):
                            await context.abort(*to_status(failure))
                        else:
                            await context.abort(failure, "cut as scripted")
                case "manifest":
                    specs.extend(message.manifest.tensors)
                case "chunk":
                    data.setdefault(message.chunk.tensor, bytearray()).extend(message.chunk.data)
        assert begin is not None
        if begin.WhichOneof("source") == "directory":
            assert self.root is not None
            self.tensors = dict(_read_files(self.root / begin.directory.path, specs))
        else:
            self.tensors = {spec.name: bytes(data[index]) for index, spec in enumerate(specs)}
        self.live = begin.weights
        self._states[begin.update_id] = weights_pb2.UPDATE_STATE_APPLIED
        if self.lose_answer:
            await context.abort(self.lose_answer.pop(0), "the answer is lost as scripted")
        return weights_pb2.UpdateWeightsResponse(state=weights_pb2.UPDATE_STATE_APPLIED, live=self.live)

    async def GetWeights(  # noqa: N802
        self, request: weights_pb2.GetWeightsRequest, context: grpc.aio.ServicerContext
    ) -> weights_pb2.GetWeightsResponse:
        return weights_pb2.GetWeightsResponse(
            live=self.live,
            state=self._states.get(request.update_id, weights_pb2.UPDATE_STATE_UNSPECIFIED),
            max_parts=1,
            features=["directory"] if self.root is not None else [],
            server_instance_id=self.instance,
        )

    def add_to(self, server: grpc.aio.Server) -> None:
        weights_pb2_grpc.add_WeightsServiceServicer_to_server(self, server)


def _read_files(folder: Path, specs: Sequence[weights_pb2.TensorSpec]) -> Iterator[tuple[str, bytes]]:
    tensors = {name: tensor for file in folder.iterdir() for name, tensor in load_file(file).items()}
    for spec in specs:
        data = bytes(byte_view(tensors[spec.name]))
        assert xxh3_64(data) == spec.xxh3_64
        yield spec.name, data
