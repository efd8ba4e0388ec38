"""Random requests, most of them wrong: each gets a status the contract knows, with a path that exists."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf.failures import from_rpc_error
from rlhf.policy.v1 import policy_pb2
from rlhf.weights.v1 import weights_pb2
from tests.policy_server.harness import DTYPES, Served, chunk, greedy, publish, serving
from tests.support.memory import private_bytes
from tests.support.models import make_tiny_gpt2

PROMISED = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.DATA_LOSS,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
GROWTH_BYTES = 64 << 20

pytestmark = pytest.mark.asyncio(loop_scope="module")
random_requests = settings(max_examples=250, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])

U32, U64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
SMALL = st.integers(0, 5)
FLOAT = st.floats(width=32)
TEXT = st.text(max_size=5)
MODEL = st.sampled_from(["", "", "policy", "reference", "nobody"])
IDS = st.lists(st.integers(0, 300), max_size=6)
JSON = st.sampled_from(["", "{}", "[]", "{", '{"role": 1}', '{"tools": 3}', '{"tokenize": true}', '{"x": [1]}'])


def maybe(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


def message(kind: Any, **fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Messages of a kind: fields that draw None are left unset, of a oneof one is set at most."""

    def build(values: dict[str, Any]) -> Any:
        return kind(**{name: value for name, value in values.items() if value is not None})

    return st.fixed_dictionaries(fields).map(build)


VERSION = message(policy_pb2.WeightsVersion, run_id=st.sampled_from(["", "run-a", "b"]), version=SMALL)
PRECONDITION = st.builds(policy_pb2.WeightsPrecondition) | st.builds(policy_pb2.WeightsPrecondition, min=VERSION)
PART = st.builds(policy_pb2.ContentPart) | st.builds(policy_pb2.ContentPart, text=TEXT)
TURN = message(policy_pb2.ChatMessage, role=TEXT, parts=st.lists(PART, max_size=2), extra_json=JSON)
CHAT = message(policy_pb2.Chat, messages=st.lists(TURN, max_size=2), template_arguments_json=JSON)
PROMPT = (
    st.builds(policy_pb2.Prompt)
    | st.builds(policy_pb2.Prompt, text=TEXT | st.just("long " * 40))
    | st.builds(policy_pb2.Prompt, token_ids=st.builds(policy_pb2.TokenIds, ids=IDS))
    | st.builds(policy_pb2.Prompt, chat=CHAT)
)
SAMPLING = message(
    policy_pb2.SamplingParams,
    temperature=maybe(FLOAT),
    top_k=maybe(U32),
    top_p=maybe(FLOAT),
    min_p=maybe(FLOAT),
    repetition_penalty=maybe(FLOAT),
    max_new_tokens=maybe(SMALL),
    min_new_tokens=maybe(SMALL),
    stop_strings=st.lists(TEXT, max_size=2),
    stop_token_ids=IDS,
    seed=maybe(U64),
    n=maybe(SMALL),
)
GENERATE = message(
    policy_pb2.GenerateRequest,
    model=MODEL,
    prompt=maybe(PROMPT),
    completion_prefix=st.just([]) | IDS,
    sampling=maybe(SAMPLING),
    logprobs=st.lists(SMALL, max_size=2),
    weights=maybe(PRECONDITION),
    priority=SMALL,
)
STREAM_GENERATE = message(policy_pb2.StreamGenerateRequest, request=maybe(GENERATE), stream_interval=maybe(SMALL))
SEQUENCE = message(policy_pb2.Sequence, prompt_token_ids=IDS, completion_token_ids=IDS)
LOG_PROBS = message(
    policy_pb2.LogProbsRequest,
    model=MODEL,
    sequences=st.lists(SEQUENCE, max_size=3),
    temperature=maybe(FLOAT),
    weights=maybe(PRECONDITION),
    entropies=st.booleans(),
)
BEGIN = message(
    weights_pb2.Begin,
    update_id=TEXT,
    model=MODEL,
    weights=maybe(VERSION),
    if_current=maybe(VERSION),
    partial=st.booleans(),
    in_flight=SMALL,
    stream=maybe(message(weights_pb2.StreamSource, part=SMALL, part_count=maybe(SMALL))),
    total_bytes=st.sampled_from([0, 128, 2**64 - 1]),
    format=st.sampled_from(["", "", "other"]),
)
SPEC = message(
    weights_pb2.TensorSpec,
    name=st.sampled_from(["transformer.ln_f.bias", "transformer.ln_f.weight", "nobody"]),
    dtype=st.sampled_from([*DTYPES.values(), "I8", ""]),
    shape=st.sampled_from([[32], [], [2**63]]),
)
CHUNK = st.builds(chunk, SMALL, st.sampled_from([0, 64, 2**64 - 1]), st.binary(max_size=70))
UPDATE = st.lists(
    st.builds(weights_pb2.UpdateWeightsRequest)
    | st.builds(weights_pb2.UpdateWeightsRequest, begin=BEGIN)
    | st.builds(
        weights_pb2.UpdateWeightsRequest,
        manifest=st.builds(weights_pb2.Manifest, tensors=st.lists(SPEC, max_size=2)),
    )
    | st.builds(weights_pb2.UpdateWeightsRequest, chunk=CHUNK)
    | st.builds(weights_pb2.UpdateWeightsRequest, commit=st.builds(weights_pb2.Commit)),
    max_size=5,
)
UPDATES = UPDATE | st.builds(lambda begin, rest: [weights_pb2.UpdateWeightsRequest(begin=begin), *rest], BEGIN, UPDATE)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    """One server for all; at the end it must have served a long request untouched and kept its memory."""
    folder = make_tiny_gpt2(tmp_path_factory.mktemp("models") / "fuzzed", context=1024)
    async with serving(folder, default_max_new_tokens=5) as running:
        expected = await greedy(running, max_new_tokens=900, min_new_tokens=900)
        long = asyncio.create_task(greedy(running, max_new_tokens=900, min_new_tokens=900))
        before = private_bytes()
        yield running
        assert await long == expected
        assert private_bytes() - before < GROWTH_BYTES


@random_requests
@given(request=GENERATE)
async def test_generate(served: Served, request: policy_pb2.GenerateRequest) -> None:
    await answered(served.policy.Generate(request, timeout=20), policy_pb2.GenerateRequest.DESCRIPTOR)


@random_requests
@given(request=STREAM_GENERATE)
async def test_stream_generate(served: Served, request: policy_pb2.StreamGenerateRequest) -> None:
    async def read() -> None:
        async for _ in served.policy.StreamGenerate(request, timeout=20):
            pass

    await answered(read(), policy_pb2.StreamGenerateRequest.DESCRIPTOR)


@random_requests
@given(request=LOG_PROBS)
async def test_log_probs(served: Served, request: policy_pb2.LogProbsRequest) -> None:
    await answered(served.policy.LogProbs(request, timeout=20), policy_pb2.LogProbsRequest.DESCRIPTOR)


@random_requests
@given(messages=UPDATES)
async def test_update_weights(served: Served, messages: list[weights_pb2.UpdateWeightsRequest]) -> None:
    await answered(publish(served, messages), weights_pb2.UpdateWeightsRequest.DESCRIPTOR)


async def test_the_paths_check_knows_what_does_not_exist() -> None:
    root = policy_pb2.StreamGenerateRequest.DESCRIPTOR

    assert exists(root, "request.prompt.chat.messages[3].parts[0]")
    assert exists(root, "request.weights.rule")
    assert not exists(root, "request.prompt.chat.messages[3].text")
    assert not exists(root, "request.model[0]")


async def answered(call: Awaitable[Any], descriptor: Descriptor) -> None:
    """Require an answer, or a promised status whose field paths all exist."""
    try:
        await call
    except grpc.RpcError as error:
        failure = from_rpc_error(error)
        assert failure.code in PROMISED, failure
        if failure.code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND):
            assert failure.violations, failure
        for violation in failure.violations:
            assert exists(descriptor, violation.field), failure


def exists(descriptor: Descriptor | None, path: str) -> bool:
    """Whether a field path names a field, an element, or (last) a oneof of a message."""
    for place, segment in enumerate(path.split(".")):
        name, index = re.fullmatch(r"(\w+)(\[\d+\])?", segment).groups()  # type: ignore[union-attr]
        if descriptor is None:
            return False
        if name in descriptor.oneofs_by_name:
            return place == path.count(".")
        field: FieldDescriptor | None = descriptor.fields_by_name.get(name)
        if field is None or (index and not field.is_repeated):
            return False
        descriptor = field.message_type
    return True
