"""Reward servers that keep every sentence of the contract, with hooks at which tests break one."""

# ruff: noqa: N802 - the contract's names

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from reward_server.conformance.wire import SERVICE
from rlhf.failures import RpcFailure, invalid_argument, not_found, overloaded, to_status
from rlhf.reward.v1 import reward_pb2, reward_pb2_grpc

Sample = reward_pb2.Sample
SampleResult = reward_pb2.SampleResult


class RightServer(reward_pb2_grpc.RewardServiceServicer):
    """Longer is better; with everything that the contract has for SCOPE_SAMPLE."""

    name = "longer"
    scope = reward_pb2.SCOPE_SAMPLE
    max_samples = 16
    max_request_bytes = 256 << 10
    max_concurrent_calls = 4
    required_metadata: Sequence[str] = ("topic",)
    needs_token_ids = True
    memory_samples = 2000
    remembers_seconds = 3600
    hold_seconds = 0.0
    """How long each call is open at least."""
    serves_health: Sequence[str] = ("", SERVICE)
    reflects: Sequence[str] | None = (SERVICE,)
    reflection_pool: DescriptorPool | None = None
    """Where reflection looks names up; None = among everything."""

    def __init__(self) -> None:
        self._memory: OrderedDict[tuple[str, str], tuple[bytes, SampleResult]] = OrderedDict()
        self._seen: set[tuple[str, str]] = set()
        self.open_calls = 0

    # Hooks, in the order in which a call meets them

    def describe(self) -> reward_pb2.GetRewardInfoResponse:
        return reward_pb2.GetRewardInfoResponse(
            name=self.name,
            version="1",
            max_samples=self.max_samples,
            max_request_bytes=self.max_request_bytes,
            max_concurrent_calls=self.max_concurrent_calls,
            scope=self.scope,
            required_metadata=self.required_metadata,
            needs_token_ids=self.needs_token_ids,
            remembers=Duration(seconds=self.remembers_seconds),
        )

    def admit(self, open_calls: int) -> None:
        if 0 < self.max_concurrent_calls < open_calls:
            raise overloaded("too many calls", retry_after=0.01)

    def check(self, request: reward_pb2.ScoreRequest) -> None:
        self.check_ids(request)
        for index, sample in enumerate(request.samples):
            self.check_sample(f"samples[{index}]", sample)
        self.check_groups(request)

    def check_ids(self, request: reward_pb2.ScoreRequest) -> None:
        if not 0 < len(request.run_id.encode()) <= 256:
            raise invalid_argument("run_id", "1 to 256 bytes")
        if not 0 < len(request.samples) <= (self.max_samples or len(request.samples)):
            raise invalid_argument("samples", f"1 to {self.max_samples}")
        ids = [sample.sample_id for sample in request.samples]
        for index, sample_id in enumerate(ids):
            if sample_id in ids[:index]:
                raise invalid_argument(f"samples[{index}].sample_id", "repeated")

    def check_sample(self, path: str, sample: Sample) -> None:
        if not 0 < len(sample.sample_id.encode()) <= 256:
            raise invalid_argument(f"{path}.sample_id", "1 to 256 bytes")
        if not sample.group_id:
            raise invalid_argument(f"{path}.group_id", "required")
        end = 0
        for index, each in enumerate(sample.sampled_ranges):
            if each.first < end:
                raise invalid_argument(f"{path}.sampled_ranges[{index}].first", "ascending, please")
            if not each.first < each.past_last <= len(sample.completion_token_ids):
                raise invalid_argument(f"{path}.sampled_ranges[{index}].past_last", "not a range of tokens")
            end = each.past_last

    def check_groups(self, request: reward_pb2.ScoreRequest) -> None:
        """Nothing to look at where samples are judged alone."""

    def failure_of(self, sample: Sample, json_keys: Sequence[str]) -> str | None:
        """The code with which a sample fails."""
        for key in json_keys:
            if key in sample.metadata and not _is_json(sample.metadata[key]):
                return "INVALID_METADATA"
        for key in self.required_metadata:
            if key not in sample.metadata or (key in json_keys and sample.metadata[key] == "null"):
                return "MISSING_METADATA"
        for message in sample.messages:
            if any(part.WhichOneof("kind") is None for part in message.parts):
                return "UNKNOWN_CONTENT"
            if message.extra_json and not message.extra_json.startswith("{"):
                return "INVALID_METADATA"
            if message.extra_json and not _is_json(message.extra_json):
                return "INVALID_METADATA"
        return "MISSING_TOKEN_IDS" if self.needs_token_ids and not sample.completion_token_ids else None

    def reward_of(self, sample: Sample, company: Sequence[Sample]) -> float:
        said = "".join(part.text for message in sample.messages for part in message.parts)
        return (len(sample.completion) + len(said)) / 10

    def judge(self, sample: Sample, company: Sequence[Sample], json_keys: Sequence[str]) -> SampleResult:
        result = SampleResult(sample_id=sample.sample_id)
        code = self.failure_of(sample, json_keys)
        if code is not None:
            result.failed.code, result.failed.message = code, "see the contract"
        elif 0 < len(sample.completion) < 4:
            result.abstained.reason = "a matter of taste"
        else:
            result.scored.reward = self.reward_of(sample, company)
            result.scored.components["characters"] = len(sample.completion)
            ranges = sample.sampled_ranges or [reward_pb2.TokenRange(past_last=len(sample.completion_token_ids))]
            sampled = {index for each in ranges for index in range(each.first, each.past_last)}
            result.scored.token_rewards.extend(
                float(index in sampled) for index in range(len(sample.completion_token_ids))
            )
        return result

    def is_late(self, sample: Sample) -> bool:
        """Whether a sample is PENDING when it comes for the first time."""
        return sample.completion.endswith(".")

    def pending(self, sample: Sample) -> SampleResult:
        result = SampleResult(sample_id=sample.sample_id)
        result.pending.retry_after.FromMilliseconds(1)
        return result

    def finish(self, request: reward_pb2.ScoreRequest, results: list[SampleResult]) -> list[SampleResult]:
        """The last word on the results of a call."""
        return results

    # The service

    def add_to(self, server: grpc.aio.Server) -> None:
        reward_pb2_grpc.add_RewardServiceServicer_to_server(self, server)

    def make_health(self) -> health.aio.HealthServicer:
        return health.aio.HealthServicer()

    async def GetRewardInfo(self, request: reward_pb2.GetRewardInfoRequest, context: Any) -> Any:
        async with self._refusals(context):
            self._find(request.reward)
            return self.describe()

    async def Score(self, request: reward_pb2.ScoreRequest, context: Any) -> Any:
        async with self._refusals(context):
            self.open_calls += 1
            try:
                self.admit(self.open_calls)
                self._find(request.reward)
                self.check(request)
                await self.work(request, context)
                results = [self.look_up(request, sample) for sample in request.samples]
                return reward_pb2.ScoreResponse(results=self.finish(request, results))
            finally:
                self.open_calls -= 1

    async def work(self, request: reward_pb2.ScoreRequest, context: Any) -> None:
        await asyncio.sleep(self.hold_seconds)

    def look_up(self, request: reward_pb2.ScoreRequest, sample: Sample) -> SampleResult:
        key = (request.run_id, sample.sample_id)
        print_of_it = hashlib.sha256(sample.SerializeToString(deterministic=True)).digest()
        if key in self._memory:
            known, result = self._memory[key]
            return self.repeat(result) if known == print_of_it else self.clash(sample, result)
        if self.is_late(sample) and key not in self._seen:
            self._seen.add(key)
            return self.pending(sample)
        company = [each for each in request.samples if each.group_id == sample.group_id]
        result = self.judge(sample, company, request.json_metadata_keys)
        self._memory[key] = print_of_it, result
        if len(self._memory) > self.memory_samples:
            self._memory.popitem(last=False)
        return result

    def repeat(self, result: SampleResult) -> SampleResult:
        return result

    def clash(self, sample: Sample, result: SampleResult) -> SampleResult:
        return SampleResult(sample_id=sample.sample_id, failed=reward_pb2.Failed(code="SAMPLE_ID_CLASH"))

    def _find(self, reward: str) -> None:
        if reward not in ("", self.name):
            raise not_found("reward", f"reward {reward!r}")

    @asynccontextmanager
    async def _refusals(self, context: Any) -> AsyncIterator[None]:
        try:
            yield
        except RpcFailure as failure:
            await self.refuse(failure, context)

    async def refuse(self, failure: RpcFailure, context: Any) -> None:
        code, message, trailers = to_status(failure)
        await context.abort(code, message, trailing_metadata=trailers)


class RightGroupServer(RightServer):
    """Longer than the others of the group is better."""

    scope = reward_pb2.SCOPE_GROUP

    def check_groups(self, request: reward_pb2.ScoreRequest) -> None:
        groups: dict[str, list[int]] = {}
        for sample in request.samples:
            groups.setdefault(sample.group_id, []).append(max(1, sample.group_size))
        for index, sample in enumerate(request.samples):
            sizes = groups[sample.group_id]
            if set(sizes) != {len(sizes)}:
                raise invalid_argument(f"samples[{index}].group_size", f"{len(sizes)} of {sizes}")

    def reward_of(self, sample: Sample, company: Sequence[Sample]) -> float:
        own = super().reward_of(sample, company)
        return own - sum(super(RightGroupServer, self).reward_of(each, company) for each in company) / len(company)

    def is_late(self, sample: Sample) -> bool:
        return sample.group_size > 1


def _is_json(text: str) -> bool:
    try:
        json.loads(text, parse_constant=lambda name: json.loads(name[:0]))
    except ValueError:
        return False
    return True


class _NeedsToken(grpc.aio.ServerInterceptor):
    def __init__(self, token: str) -> None:
        self._token = token

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        if dict(details.invocation_metadata).get("authorization") == f"Bearer {self._token}":
            return await continuation(details)
        return grpc.unary_unary_rpc_method_handler(_unauthenticated)


async def _unauthenticated(request: bytes, context: Any) -> None:
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, "a token, please")


@asynccontextmanager
async def serving(
    servicer: RightServer, *, credentials: grpc.ServerCredentials | None = None, token: str = ""
) -> AsyncIterator[str]:
    """The server on a real socket, with health and reflection; its address."""
    server = grpc.aio.server(
        interceptors=[_NeedsToken(token)] if token else [],
        options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", servicer.max_request_bytes)],
    )
    servicer.add_to(server)
    checks = servicer.make_health()
    await checks.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    for service in servicer.serves_health:
        await checks.set(service, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    if servicer.reflects is not None:
        reflection.enable_server_reflection(servicer.reflects, server, pool=servicer.reflection_pool)
    if credentials is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)
