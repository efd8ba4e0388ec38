"""What Score does with ordinary batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import grpc

from reward_server.conformance.case import Broken, Level, NotApplicable, case, watch
from reward_server.conformance.compare import expect_alike
from reward_server.conformance.exchange import Exchange, Mistake
from reward_server.conformance.session import Session
from rlhf.reward.v1 import reward_pb2

_SEVERAL = 6
_SMALLEST_SAMPLE_BYTES = 32


@case("score/ordinary-batch", Level.MUST, "Score judges a micro-batch.")
async def ordinary_batch(session: Session) -> None:
    """A batch of ordinary samples is judged."""
    await session.survey()


@watch(
    "score/every-sample-answered-once",
    Level.MUST,
    "Exactly one result for each sample of the request, in any order.",
    absent="no batch was answered",
)
def every_sample_answered_once(exchange: Exchange) -> Iterator[str | None]:
    """Every answer has exactly one result for each sample, and no other."""
    if not exchange.is_answer():
        return
    assert isinstance(exchange.request, reward_pb2.ScoreRequest)
    assert isinstance(exchange.response, reward_pb2.ScoreResponse)
    asked = {sample.sample_id for sample in exchange.request.samples}
    answered = Counter(result.sample_id for result in exchange.response.results)
    faults = (
        ("missing", asked - answered.keys()),
        ("unknown", answered.keys() - asked),
        ("repeated", {each for each, count in answered.items() if count > 1}),
    )
    yield "; ".join(f"{fault}: {', '.join(sorted(ids))}" for fault, ids in faults if ids) or None


@case("score/single-sample", Level.MUST, 'From 1 to max_samples, else INVALID_ARGUMENT "samples".')
async def single_sample(session: Session) -> None:
    """A batch of one sample is judged."""
    await session.answered(session.request(session.samples(1)))


@case("score/largest-batch", Level.MUST, 'From 1 to max_samples, else INVALID_ARGUMENT "samples".')
async def largest_batch(session: Session) -> None:
    """A batch of max_samples is judged."""
    await session.answered(_full(session))


@case("score/too-many-samples", Level.MUST, 'Most samples in a call; more = INVALID_ARGUMENT "samples".')
async def too_many_samples(session: Session) -> None:
    """A batch of max_samples + 1 is INVALID_ARGUMENT."""
    request = _full(session, *session.samples(1))
    mistake = Mistake((grpc.StatusCode.INVALID_ARGUMENT,), "INVALID_FIELD", ("samples",))
    exchange = await session.settled(request, mistake=mistake)
    if exchange.code not in mistake.codes:
        raise Broken(f"expected INVALID_ARGUMENT for {len(request.samples)} samples", exchange)


@case(
    "score/split-merge-reorder",
    Level.MUST,
    "SCOPE_SAMPLE: on the sample alone. A client MAY split, merge and reorder freely.",
)
async def split_merge_reorder(session: Session) -> None:
    """Samples get the same results alone, together, and together in another order."""
    if session.in_groups:
        raise NotApplicable("the server declares SCOPE_GROUP")
    if session.info.max_samples == 1:
        raise NotApplicable("the server takes one sample in a call")
    samples = session.samples(min(_SEVERAL, session.info.max_samples or _SEVERAL))
    alone = [result for sample in samples for result in await session.judge([sample])]
    together = await session.judge(session.renamed(samples))
    expect_alike(alone, together, "alone and in company", session.last)
    reordered = await session.judge(session.renamed(samples)[::-1])
    expect_alike(alone, reordered[::-1], "alone and in another order", session.last)


@case(
    "score/one-bad-sample",
    Level.MUST,
    "A status is about the whole call; what is wrong with one sample alone is its FAILED.",
    explained_by=(
        "score/split-merge-reorder",
        "content/unknown-part",
        "repeats/same-answer",
        "repeats/final-stays-final",
    ),
)
async def one_bad_sample(session: Session) -> None:
    """A sample that can't be judged leaves the others of its call alone."""
    if session.in_groups:
        raise NotApplicable("the server declares SCOPE_GROUP")
    *good, bad = session.samples(min(_SEVERAL, max(2, session.info.max_samples or _SEVERAL)))
    bad.messages.add(role="user").parts.add()
    expected = await session.judge(session.renamed(good))
    # The second time none of them is PENDING any more: all are in one answer.
    for _ in range(2):
        results = await session.judge([*good, bad])
        expect_alike(expected, results[:-1], "beside a sample that can't be judged", session.last)


@case(
    "score/log-metadata",
    Level.MUST,
    "Metadata: a client MAY send x-rlhf-run-id, x-rlhf-step and x-request-id for the server's logs; they MUST NOT "
    "change a score.",
)
async def log_metadata(session: Session) -> None:
    """Scores are the same with x-rlhf-run-id, x-rlhf-step and x-request-id as without."""
    samples = session.unit()
    headers = (("x-rlhf-run-id", session.run_id), ("x-rlhf-step", "3"), ("x-request-id", "conformance/1"))
    expected = await session.judge(samples)
    results = await session.judge(session.renamed(samples), headers=headers)
    expect_alike(expected, results, "without and with x-rlhf-* metadata", session.last)


def _full(session: Session, *more: reward_pb2.Sample) -> reward_pb2.ScoreRequest:
    """A request for max_samples samples, and some more."""
    if not session.info.max_samples:
        raise NotApplicable("max_samples is 0: no limit")
    # A sample has its ids at least, so that the first look saves making millions.
    if session.info.max_samples * _SMALLEST_SAMPLE_BYTES <= session.max_request_bytes:
        request = session.request([*session.samples(session.info.max_samples), *more])
        if request.ByteSize() <= session.max_request_bytes:
            return request
    raise NotApplicable("max_samples samples are larger than max_request_bytes")
