"""Texts of every kind, conversations, and what came after 1.0."""

from __future__ import annotations

from typing import Any, TypeVar

from google.protobuf.message import Message

from reward_server.conformance.case import Broken, Level, NotApplicable, case
from reward_server.conformance.compare import expect_alike, kind, shown
from reward_server.conformance.material import Content, token_ids
from reward_server.conformance.session import Session
from rlhf.reward.v1 import reward_pb2

M = TypeVar("M", bound=Message)

_LONG_CHARACTERS = 1 << 16
# Each in a call of its own, so that a failure says which.
_NOT_ASCII = {
    "Latin letters with marks": "Ça va déjà très bien, Łukasz.",
    "emoji": "👍🏽 👩‍👩‍👧 🏳️‍🌈",
    "text from right to left": "שלום עולם, مرحبا بالعالم",
    "a NUL character": "before\0after",
    "combining marks on nothing": "\u0301\u0323\u20dd",
    "the replacement character": "cut\ufffd",
    "a character beyond Unicode's assigned ones": "\U0010ffff",
}
# Field 1000, of a length that no scalar has.
_UNKNOWN_FIELD = b"\xc2\x3e\x0cof a release"
_UNKNOWN_FINISH_REASON = 1000


@case(
    "content/empty-completion",
    Level.MUST,
    "The completion's text: without special tokens and stop string, ill-formed bytes as U+FFFD. MAY be empty.",
)
async def empty_completion(session: Session) -> None:
    """An empty completion is answered."""
    await session.answered(session.request(session.samples(1, [Content("Go on.", "")])))


@case(
    "content/empty-prompt",
    Level.MUST,
    "The prompt's text as the data has it; a chat as its template rendered it. MAY be empty.",
)
async def empty_prompt(session: Session) -> None:
    """An empty prompt is answered."""
    await session.answered(session.request(session.samples(1, [Content("", "It begins without a question.")])))


@case(
    "content/long-completion",
    Level.MUST,
    "Largest encoded ScoreRequest in bytes; 0 = 4 MiB (4194304), gRPC's default.",
)
async def long_completion(session: Session) -> None:
    """A completion of 64 Ki characters, or of a quarter of max_request_bytes, is answered."""
    text = ("It goes on and on. " * _LONG_CHARACTERS)[: min(_LONG_CHARACTERS, session.max_request_bytes // 4)]
    await session.answered(session.request(session.samples(1, [Content("Go on.", text)])))


@case(
    "content/non-ascii",
    Level.MUST,
    "The completion's text: without special tokens and stop string, ill-formed bytes as U+FFFD. MAY be empty.",
)
async def non_ascii(session: Session) -> None:
    """Emoji, text from right to left, NUL, lone combining marks and the like are answered."""
    for what, text in _NOT_ASCII.items():
        await session.accepted(session.request(session.samples(1, [Content(text, text)])), what)


@case(
    "content/non-ascii-ids",
    Level.MUST,
    "Required. Echo: the sample_id of one sample of the request.",
    explained_by=("score/every-sample-answered-once",),
)
async def non_ascii_ids(session: Session) -> None:
    """A sample_id that is not ASCII comes back as it was sent."""
    (sample,) = session.samples(1)
    sample.sample_id = f"é-\u0301-👍-{sample.sample_id}"
    exchange = await session.accepted(session.request([sample]), "a sample_id that is not ASCII", watched=False)
    assert isinstance(exchange.response, reward_pb2.ScoreResponse)
    ids = [result.sample_id for result in exchange.response.results]
    if ids != [sample.sample_id]:
        raise Broken(f"the sample_id came back as {ids}", exchange)


@case(
    "content/chat", Level.MUST, "The conversation, the completion's turns included. Empty = the prompt is not a chat."
)
async def chat(session: Session) -> None:
    """A conversation, with a turn without content, is answered."""
    (sample,) = session.samples(1)
    _say(sample, "user", "Was the film good?")
    _say(sample, "tool", extra_json='{"tool_call_id": "1", "name": "film"}')
    _say(sample, "assistant", sample.completion)
    await session.answered(session.request([sample]))


@case(
    "content/parts-joined",
    Level.MUST,
    "The content; texts are joined in order with nothing between. MAY be empty.",
)
async def parts_joined(session: Session) -> None:
    """A turn in several parts is judged as the same turn in one."""
    samples = session.unit()
    in_one, in_parts = session.renamed(samples), session.renamed(samples)
    for sample in in_one:
        _say(sample, "assistant", sample.completion)
    for sample in in_parts:
        middle = len(sample.completion) // 2
        _say(sample, "assistant", sample.completion[:middle], "", sample.completion[middle:])
    expected = await session.judge(in_one)
    expect_alike(expected, await session.judge(in_parts), "in one part and in three", session.last)


@case(
    "content/unknown-part",
    Level.MUST,
    "Unset is what a kind that this server does not know looks like: it MUST answer FAILED with the code "
    "UNKNOWN_CONTENT for the sample, and MUST NOT skip the part.",
)
async def unknown_part(session: Session) -> None:
    """A part of a kind that the server does not know is UNKNOWN_CONTENT."""
    (sample,) = session.samples(1)
    _say(sample, "user", "What is in the picture?")
    sample.messages[0].parts.append(_from_the_future(reward_pb2.ContentPart()))
    _say(sample, "assistant", sample.completion)
    await expect_failed(session, sample, "UNKNOWN_CONTENT", "a part of an unknown kind")


@case(
    "content/extra-json",
    Level.MUST,
    "A JSON object with the rest of the turn (name, tool_calls, tool_call_id …); empty = none. Anything but a JSON "
    "object = FAILED with the code INVALID_METADATA.",
)
async def extra_json(session: Session) -> None:
    """An extra_json that is not a JSON object is INVALID_METADATA."""
    for text in ("[1]", "null", '"name"', "{", "name"):
        (sample,) = session.samples(1)
        _say(sample, "user", "Hello", extra_json=text)
        await expect_failed(session, sample, "INVALID_METADATA", f"the extra_json {text}")


@case(
    "content/missing-token-ids",
    Level.MUST,
    "Missing where they are needed = FAILED with the code MISSING_TOKEN_IDS.",
)
async def missing_token_ids(session: Session) -> None:
    """A sample without the token ids that the server needs is MISSING_TOKEN_IDS."""
    if not session.info.needs_token_ids:
        raise NotApplicable("needs_token_ids is false")
    (sample,) = session.samples(1)
    sample.ClearField("completion_token_ids")
    await expect_failed(session, sample, "MISSING_TOKEN_IDS", "a sample without token ids")


@case(
    "content/token-ids",
    Level.MUST,
    "The completion's token ids by the policy's tokenizer, EOS included.",
)
async def with_token_ids(session: Session) -> None:
    """Token ids with sampled_ranges are taken, needed or not."""
    (sample,) = session.samples(1, [Content("What is 6 times 7?", "42")])
    sample.completion_token_ids[:] = token_ids(sample.completion)
    sample.sampled_ranges.add(first=0, past_last=1)
    sample.sampled_ranges.add(first=1, past_last=2)
    await session.answered(session.request([sample]))


@case(
    "content/unknown-fields",
    Level.MUST,
    "New fields and enum values MAY appear, and a server drops those that it does not know.",
)
async def unknown_fields(session: Session) -> None:
    """Fields that came after 1.0 change nothing."""
    samples = session.unit()
    expected = await session.judge(samples)
    await session.accepted(_from_the_future(session.request(session.unit())), "a request with an unknown field")
    results = await session.judge([_from_the_future(sample) for sample in session.renamed(samples)])
    expect_alike(expected, results, "without and with unknown fields", session.last)


@case(
    "content/unknown-finish-reason",
    Level.MUST,
    "A server MUST treat a value that it does not know as FINISH_REASON_UNSPECIFIED.",
)
async def unknown_finish_reason(session: Session) -> None:
    """A finish reason that came after 1.0 counts as unset."""
    samples = session.unit()
    expected = await session.judge(samples)
    unknown = session.renamed(samples)
    for sample in unknown:
        sample.MergeFromString(reward_pb2.Sample(finish_reason=_UNKNOWN_FINISH_REASON).SerializeToString())  # type: ignore[arg-type]
    expect_alike(expected, await session.judge(unknown), "with an unknown finish reason", session.last)


async def expect_failed(session: Session, sample: reward_pb2.Sample, code: str, what: str, **fields: Any) -> None:
    """Raises Broken unless the sample, which is wrong in `what`, is FAILED with the code."""
    (result,) = await session.judge([sample], **fields)
    if kind(result) != "failed" or result.failed.code != code:
        raise Broken(f"expected FAILED {code} for {what}, not {shown(result)}", session.last)


def _say(sample: reward_pb2.Sample, role: str, *texts: str, extra_json: str = "") -> None:
    message = sample.messages.add(role=role, extra_json=extra_json)
    for text in texts:
        message.parts.add(text=text)


def _from_the_future(message: M) -> M:
    return type(message).FromString(message.SerializeToString() + _UNKNOWN_FIELD)
