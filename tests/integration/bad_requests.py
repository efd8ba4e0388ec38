"""Random mistakes: a valid request of any RPC with one thing wrong, and what the contract says that it gets."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import Message
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from rlhf.policy.v1 import policy_pb2
from rlhf.reward.v1 import reward_pb2
from rlhf.tensors import xxh3_64
from rlhf.weights.v1 import weights_pb2

INVALID = grpc.StatusCode.INVALID_ARGUMENT
NOT_FOUND = grpc.StatusCode.NOT_FOUND
FAILED = grpc.StatusCode.FAILED_PRECONDITION


@dataclass(frozen=True)
class Limits:
    """What the servers under attack accept, as they tell it themselves."""

    vocab_size: int
    max_context_tokens: int
    max_completions: int
    max_samples: int
    parameter: str
    parameter_shape: tuple[int, ...]
    total_bytes: int


@dataclass(frozen=True)
class BadRequest:
    """`messages` to send to `rpc`, and the answer that is promised; `path` None = no field is to blame."""

    rpc: str
    messages: tuple[Message, ...]
    code: grpc.StatusCode
    path: str | None

    def __repr__(self) -> str:
        """Short enough to read in a failure."""
        return f"{self.rpc} {str(self.messages)[:600]} → {self.code.name} {self.path}"


def bad_requests(limits: Limits) -> SearchStrategy[BadRequest]:
    """Each RPC is as likely as another."""
    return st.one_of(
        bad_generate(limits, "Generate"),
        bad_generate(limits, "StreamGenerate"),
        bad_log_probs(limits),
        bad_names("GetModel", policy_pb2.GetModelRequest, "model"),
        bad_update(limits),
        bad_names("GetWeights", weights_pb2.GetWeightsRequest, "model"),
        bad_score(limits),
        bad_names("GetRewardInfo", reward_pb2.GetRewardInfoRequest, "reward"),
    )


_unknown_names = st.text(min_size=1, max_size=40).filter(lambda name: name not in ("policy", "reference", "length"))
_above_one = st.floats(min_value=1.0, exclude_min=True, width=32, allow_nan=False)
_negative = st.floats(max_value=0.0, exclude_max=True, width=32, allow_nan=False)
_not_finite = st.sampled_from([math.nan, math.inf, -math.inf])
_uint32 = 2**32 - 1


def _beyond(limit: int, most: int = _uint32) -> SearchStrategy[int]:
    return st.integers(min_value=limit, max_value=most)


def bad_names(rpc: str, request: Callable[..., Message], field: str) -> SearchStrategy[BadRequest]:
    """An RPC whose only mistake is a name that nobody has."""
    return _unknown_names.map(lambda name: BadRequest(rpc, (request(**{field: name}),), NOT_FOUND, field))


@st.composite
def bad_generate(draw: DrawFn, limits: Limits, rpc: str) -> BadRequest:
    """Generate and StreamGenerate, whose paths differ by "request."."""
    ids = draw(st.lists(st.integers(0, limits.vocab_size - 1), min_size=1, max_size=8))
    request = policy_pb2.GenerateRequest(
        prompt=policy_pb2.Prompt(token_ids=policy_pb2.TokenIds(ids=ids)),
        sampling=policy_pb2.SamplingParams(max_new_tokens=4),
    )
    code, path = draw(st.sampled_from(_GENERATE_MISTAKES))(draw, request, limits)
    if rpc == "Generate":
        return BadRequest(rpc, (request,), code, path)
    streamed = policy_pb2.StreamGenerateRequest(request=request)
    return BadRequest(rpc, (streamed,), code, f"request.{path}")


Mistake = tuple[grpc.StatusCode, str]


def _set_sampling(field: str, values: SearchStrategy[Any]) -> Callable[[DrawFn, Any, Limits], Mistake]:
    def apply(draw: DrawFn, request: Any, limits: Limits) -> Mistake:
        setattr(request.sampling, field, draw(values))
        return INVALID, f"sampling.{field}"

    return apply


def _no_prompt(draw: DrawFn, request: Any, limits: Limits) -> Mistake:
    request.ClearField("prompt")
    return INVALID, "prompt"


def _no_ids(draw: DrawFn, request: Any, limits: Limits) -> Mistake:
    del request.prompt.token_ids.ids[:]
    return INVALID, "prompt.token_ids.ids"


def _bad_id(draw: DrawFn, request: Any, limits: Limits) -> Mistake:
    at = draw(st.integers(0, len(request.prompt.token_ids.ids) - 1))
    request.prompt.token_ids.ids[at] = draw(_beyond(limits.vocab_size))
    return INVALID, f"prompt.token_ids.ids[{at}]"


def _too_long(draw: DrawFn, request: Any, limits: Limits) -> Mistake:
    extra = draw(st.integers(0, 500))
    request.prompt.token_ids.ids[:] = [0] * (limits.max_context_tokens + extra)
    return INVALID, "prompt"


def _empty_text(draw: DrawFn, request: Any, limits: Limits) -> Mistake:
    request.prompt.text = ""
    return INVALID, "prompt.text"


def _no_messages(draw: DrawFn, request: Any, limits: Limits) -> Mistake:
    request.prompt.chat.SetInParent()
    return INVALID, "prompt.chat.messages"


def _bad_template_arguments(draw: DrawFn, request: Any, limits: Limits) -> Mistake:
    turn = request.prompt.chat.messages.add(role="user")
    turn.parts.add(text="hello")
    request.prompt.chat.template_arguments_json = draw(st.sampled_from(["{", "[]", "1", '"x"', "nul", "{'a': 1}"]))
    return INVALID, "prompt.chat.template_arguments_json"


def _bad_extra(draw: DrawFn, request: Any, limits: Limits) -> Mistake:
    turns = draw(st.integers(1, 4))
    for _ in range(turns):
        request.prompt.chat.messages.add(role="user").parts.add(text="hello")
    at = draw(st.integers(0, turns - 1))
    request.prompt.chat.messages[at].extra_json = draw(st.sampled_from(["{", "[]", "3", '{"role": "x"}']))
    return INVALID, f"prompt.chat.messages[{at}].extra_json"


def _part_without_kind(draw: DrawFn, request: Any, limits: Limits) -> Mistake:
    parts = request.prompt.chat.messages.add(role="user").parts
    good = draw(st.integers(0, 3))
    for _ in range(good):
        parts.add(text="hello")
    parts.add()
    return INVALID, f"prompt.chat.messages[0].parts[{good}]"


def _min_above_max(draw: DrawFn, request: Any, limits: Limits) -> Mistake:
    request.sampling.min_new_tokens = draw(_beyond(request.sampling.max_new_tokens + 1))
    return INVALID, "sampling.min_new_tokens"


def _stop_string(draw: DrawFn, request: Any, limits: Limits) -> Mistake:
    good = draw(st.integers(0, 5))
    request.sampling.stop_strings.extend(["stop"] * good + [draw(st.sampled_from(["", "x" * 257, "é" * 129]))])
    return INVALID, f"sampling.stop_strings[{good}]"


def _many_stop_strings(draw: DrawFn, request: Any, limits: Limits) -> Mistake:
    request.sampling.stop_strings.extend(["stop"] * draw(st.integers(17, 200)))
    return INVALID, "sampling.stop_strings"


def _stop_token(draw: DrawFn, request: Any, limits: Limits) -> Mistake:
    request.sampling.stop_token_ids.extend([0, 1, draw(_beyond(limits.vocab_size))])
    return INVALID, "sampling.stop_token_ids[2]"


def _prefix_id(draw: DrawFn, request: Any, limits: Limits) -> Mistake:
    request.completion_prefix.append(draw(_beyond(limits.vocab_size)))
    return INVALID, "completion_prefix[0]"


def _prefix_leaves_nothing(draw: DrawFn, request: Any, limits: Limits) -> Mistake:
    request.completion_prefix.extend([0] * draw(st.integers(request.sampling.max_new_tokens, 20)))
    return INVALID, "completion_prefix"


def _prefix_with_n(draw: DrawFn, request: Any, limits: Limits) -> Mistake:
    request.completion_prefix.append(0)
    request.sampling.n = draw(st.integers(2, limits.max_completions))
    return INVALID, "sampling.n"


def _logprob_kind(draw: DrawFn, request: Any, limits: Limits) -> Mistake:
    wrong = draw(st.sampled_from([0, 3, 99, policy_pb2.LOG_PROB_KIND_RAW]))
    request.logprobs.extend([policy_pb2.LOG_PROB_KIND_RAW, wrong])
    return INVALID, "logprobs[1]"


def _no_rule(draw: DrawFn, request: Any, limits: Limits) -> Mistake:
    request.weights.SetInParent()
    return INVALID, "weights.rule"


def _priority(draw: DrawFn, request: Any, limits: Limits) -> Mistake:
    request.priority = draw(st.integers(3, 2**31 - 1))
    return INVALID, "priority"


def _model(draw: DrawFn, request: Any, limits: Limits) -> Mistake:
    request.model = draw(_unknown_names)
    return NOT_FOUND, "model"


_GENERATE_MISTAKES: list[Callable[[DrawFn, Any, Limits], Mistake]] = [
    _set_sampling("temperature", _negative | _not_finite),
    _set_sampling("top_p", _negative | _above_one | st.just(0.0) | _not_finite),
    _set_sampling("min_p", _negative | _above_one | _not_finite),
    _set_sampling("repetition_penalty", _negative | st.just(0.0) | _not_finite),
    _set_sampling("max_new_tokens", st.just(0)),
    _set_sampling("n", st.just(0) | _beyond(1025)),
    *(_no_prompt, _no_ids, _bad_id, _too_long, _empty_text, _no_messages, _bad_template_arguments, _bad_extra),
    *(_part_without_kind, _min_above_max, _stop_string, _many_stop_strings, _stop_token, _prefix_id),
    *(_prefix_leaves_nothing, _prefix_with_n, _logprob_kind, _no_rule, _priority, _model),
]


@st.composite
def bad_log_probs(draw: DrawFn, limits: Limits) -> BadRequest:
    """LogProbs with one wrong sequence among right ones, or a wrong setting."""
    count = draw(st.integers(1, 4))
    request = policy_pb2.LogProbsRequest(
        sequences=[policy_pb2.Sequence(prompt_token_ids=[0, 1], completion_token_ids=[2]) for _ in range(count)]
    )
    at = draw(st.integers(0, count - 1))
    wrong = request.sequences[at]
    side = draw(st.sampled_from(["prompt_token_ids", "completion_token_ids"]))
    ids = getattr(wrong, side)
    match draw(st.sampled_from(["none", "empty", "id", "long", "temperature", "rule", "model"])):
        case "none":
            del request.sequences[:]
            return BadRequest("LogProbs", (request,), INVALID, "sequences")
        case "empty":
            del ids[:]
            return BadRequest("LogProbs", (request,), INVALID, f"sequences[{at}].{side}")
        case "id":
            ids.append(draw(_beyond(limits.vocab_size)))
            return BadRequest("LogProbs", (request,), INVALID, f"sequences[{at}].{side}[{len(ids) - 1}]")
        case "long":
            ids.extend([0] * limits.max_context_tokens)
            return BadRequest("LogProbs", (request,), INVALID, f"sequences[{at}]")
        case "temperature":
            request.temperature = draw(_negative | st.just(0.0) | _not_finite)
            return BadRequest("LogProbs", (request,), INVALID, "temperature")
        case "rule":
            request.weights.SetInParent()
            return BadRequest("LogProbs", (request,), INVALID, "weights.rule")
        case _:
            request.model = draw(_unknown_names)
            return BadRequest("LogProbs", (request,), NOT_FOUND, "model")


@st.composite
def bad_update(draw: DrawFn, limits: Limits) -> BadRequest:
    """UpdateWeights with a wrong Begin, a wrong manifest, a wrong chunk, or messages out of order."""
    begin = weights_pb2.Begin(
        update_id=draw(st.uuids()).hex,
        weights=policy_pb2.WeightsVersion(run_id="attacker", incarnation=1, version=1),
        if_current=policy_pb2.WeightsVersion(),
        partial=True,
        stream=weights_pb2.StreamSource(),
        total_bytes=limits.total_bytes,
    )
    data = bytes(min(limits.total_bytes, 1024))
    spec = weights_pb2.TensorSpec(name=limits.parameter, dtype="F32", shape=limits.parameter_shape)
    chunk = weights_pb2.Chunk(tensor=0, offset=0, data=data, xxh3_64=xxh3_64(data))
    stream = [_of(begin=begin), _of(manifest=weights_pb2.Manifest(tensors=[spec])), _of(chunk=chunk)]

    def answer(messages: Iterable[Message], code: grpc.StatusCode, path: str | None) -> BadRequest:
        return BadRequest("UpdateWeights", tuple(messages), code, path)

    def with_begin(code: grpc.StatusCode, path: str | None) -> BadRequest:
        return answer([_of(begin=begin)], code, path)

    def with_spec(field: str) -> BadRequest:
        manifest = weights_pb2.Manifest(tensors=[spec])
        return answer([stream[0], _of(manifest=manifest)], INVALID, f"manifest.tensors[0].{field}")

    def with_chunk(code: grpc.StatusCode, path: str | None) -> BadRequest:
        return answer([*stream[:2], _of(chunk=chunk)], code, path)

    match draw(st.integers(0, 21)):
        case 0:
            begin.update_id = draw(st.sampled_from(["", "x" * 257]))
            return with_begin(INVALID, "begin.update_id")
        case 1:
            begin.model = draw(_unknown_names)
            return with_begin(NOT_FOUND, "begin.model")
        case 2:
            begin.model = "reference"
            return with_begin(FAILED, None)
        case 3:
            begin.weights.run_id = ""
            return with_begin(INVALID, "begin.weights.run_id")
        case 4:
            begin.ClearField("if_current")
            return with_begin(INVALID, "begin.if_current")
        case 5:
            begin.if_current.run_id = "somebody"
            return with_begin(FAILED, None)
        case 6:
            begin.in_flight = draw(st.integers(5, 2**31 - 1))
            return with_begin(INVALID, "begin.in_flight")
        case 7:
            begin.ClearField("source")
            return with_begin(INVALID, "begin.source")
        case 8:
            begin.format = draw(st.text(min_size=1, max_size=20))
            return with_begin(INVALID, "begin.format")
        case 9:
            begin.stream.part_count = draw(st.just(0) | _beyond(1 << 20))
            return with_begin(INVALID, "begin.stream.part_count")
        case 10:
            begin.stream.part = draw(_beyond(1))
            return with_begin(INVALID, "begin.stream.part")
        case 11:
            begin.directory.path = draw(st.sampled_from(["/etc", "../x", "a/../../b"]))
            return with_begin(grpc.StatusCode.PERMISSION_DENIED, None)
        case 12:
            begin.total_bytes = draw(_beyond(1 << 50, 2**63))
            return with_begin(grpc.StatusCode.RESOURCE_EXHAUSTED, None)
        case 13:
            return answer(stream[: draw(st.integers(1, 3))], INVALID, "commit")
        case 14:
            return answer([weights_pb2.UpdateWeightsRequest()], INVALID, "message")
        case 15:
            return answer([draw(st.sampled_from(stream[1:]))], INVALID, "begin")
        case 16:
            return answer([stream[0], stream[0]], INVALID, "begin")
        case 17:
            spec.name = draw(st.text(max_size=30).filter(lambda name: "." not in name))
            return with_spec("name")
        case 18:
            spec.dtype = draw(st.text(max_size=6).filter(lambda name: name not in ("F32", "F16", "BF16", "F64")))
            return with_spec("dtype")
        case 19:
            spec.shape.append(draw(st.integers(2, 2**40)))
            return with_spec("shape")
        case 20:
            chunk.xxh3_64 ^= draw(st.integers(1, 2**64 - 1))
            return with_chunk(grpc.StatusCode.DATA_LOSS, None)
        case _:
            chunk.tensor = draw(_beyond(1))
            return with_chunk(INVALID, "chunk.tensor")


def _of(**kind: Any) -> weights_pb2.UpdateWeightsRequest:
    return weights_pb2.UpdateWeightsRequest(**kind)


@st.composite
def bad_score(draw: DrawFn, limits: Limits) -> BadRequest:
    """Score with one wrong sample among right ones, or a wrong envelope."""
    count = draw(st.integers(2, 5))
    request = reward_pb2.ScoreRequest(
        run_id="attacker",
        samples=[
            reward_pb2.Sample(sample_id=str(index), group_id=str(index), prompt="p", completion="c")
            for index in range(count)
        ],
    )
    at = draw(st.integers(1, count - 1))
    wrong = request.samples[at]

    def answer(path: str, code: grpc.StatusCode = INVALID) -> BadRequest:
        return BadRequest("Score", (request,), code, path)

    match draw(st.integers(0, 9)):
        case 0:
            request.run_id = draw(st.sampled_from(["", "x" * 257]))
            return answer("run_id")
        case 1:
            del request.samples[:]
            return answer("samples")
        case 2:
            for index in range(limits.max_samples + draw(st.integers(0, 50))):
                request.samples.add(sample_id=f"more-{index}", group_id="g")
            return answer("samples")
        case 3:
            wrong.sample_id = draw(st.sampled_from(["", "x" * 257]))
            return answer(f"samples[{at}].sample_id")
        case 4:
            wrong.sample_id = request.samples[0].sample_id
            return answer(f"samples[{at}].sample_id")
        case 5:
            wrong.group_id = ""
            return answer(f"samples[{at}].group_id")
        case 6:
            wrong.completion_token_ids.extend([1, 2, 3])
            first = draw(st.integers(0, 2))
            wrong.sampled_ranges.add(first=first, past_last=draw(st.integers(0, first)))
            return answer(f"samples[{at}].sampled_ranges[0].past_last")
        case 7:
            wrong.completion_token_ids.extend([1, 2, 3])
            wrong.sampled_ranges.add(first=0, past_last=draw(_beyond(4)))
            return answer(f"samples[{at}].sampled_ranges[0].past_last")
        case 8:
            wrong.completion_token_ids.extend([1, 2, 3])
            wrong.sampled_ranges.add(first=1, past_last=3)
            wrong.sampled_ranges.add(first=draw(st.integers(0, 2)), past_last=3)
            return answer(f"samples[{at}].sampled_ranges[1].first")
        case _:
            request.reward = draw(_unknown_names)
            return answer("reward", NOT_FOUND)
