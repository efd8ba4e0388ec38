"""Texts, conversations and what came after 1.0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc

from rlhf.failures import invalid_argument
from rlhf.reward.v1 import reward_pb2
from tests.reward_server.conformance.broken.marking import caught_by, renamed
from tests.reward_server.conformance.right_server import RightServer, Sample, SampleResult


class _Crashes(RightServer):
    """Has an error of its own for some samples."""

    def crashes(self, sample: Sample) -> bool:
        raise NotImplementedError

    async def work(self, request: reward_pb2.ScoreRequest, context: Any) -> None:
        if any(map(self.crashes, request.samples)):
            await context.abort(grpc.StatusCode.UNKNOWN, "Exception calling application")
        await super().work(request, context)


@caught_by("content/empty-completion")
class CrashesOnAnEmptyCompletion(_Crashes):
    def crashes(self, sample: Sample) -> bool:
        return not sample.completion


@caught_by("content/empty-prompt")
class CrashesOnAnEmptyPrompt(_Crashes):
    def crashes(self, sample: Sample) -> bool:
        return not sample.prompt


@caught_by("content/long-completion")
class CrashesOnALongCompletion(_Crashes):
    def crashes(self, sample: Sample) -> bool:
        return len(sample.completion) > 10_000


@caught_by("content/non-ascii")
class CrashesOnNonAscii(_Crashes):
    def crashes(self, sample: Sample) -> bool:
        return not sample.completion.isascii()


@caught_by("content/non-ascii-ids")
class ManglesNonAsciiIds(RightServer):
    def finish(self, request: reward_pb2.ScoreRequest, results: list[SampleResult]) -> list[SampleResult]:
        if len(results[0].sample_id.encode()) == 256:
            return results
        return [renamed(each, each.sample_id.encode("ascii", "replace").decode()) for each in results]


@caught_by("content/chat")
class CrashesOnATurnWithoutContent(_Crashes):
    def crashes(self, sample: Sample) -> bool:
        return any(not message.parts and message.role == "tool" for message in sample.messages)


@caught_by("content/parts-joined")
class JoinsPartsWithSpaces(RightServer):
    def reward_of(self, sample: Sample, company: Sequence[Sample]) -> float:
        spaces = sum(max(0, len(message.parts) - 1) for message in sample.messages)
        return super().reward_of(sample, company) + spaces


@caught_by("content/unknown-part")
class SkipsUnknownParts(RightServer):
    def failure_of(self, sample: Sample, json_keys: Sequence[str]) -> str | None:
        code = super().failure_of(sample, json_keys)
        return None if code == "UNKNOWN_CONTENT" else code


@caught_by("content/extra-json")
class TakesAnyExtraJson(RightServer):
    def failure_of(self, sample: Sample, json_keys: Sequence[str]) -> str | None:
        code = super().failure_of(sample, json_keys)
        return None if any(message.extra_json == "null" for message in sample.messages) else code


@caught_by("content/missing-token-ids")
class JudgesWithoutTokenIds(RightServer):
    def failure_of(self, sample: Sample, json_keys: Sequence[str]) -> str | None:
        code = super().failure_of(sample, json_keys)
        return None if code == "MISSING_TOKEN_IDS" else code


@caught_by("content/token-ids")
class RefusesRangesThatTouch(RightServer):
    def check_sample(self, path: str, sample: Sample) -> None:
        super().check_sample(path, sample)
        ends = {each.past_last for each in sample.sampled_ranges}
        if any(each.first in ends for each in sample.sampled_ranges):
            raise invalid_argument(f"{path}.sampled_ranges[1].first", "touches")


@caught_by("content/unknown-fields")
class RefusesUnknownFields(RightServer):
    def check(self, request: reward_pb2.ScoreRequest) -> None:
        known = reward_pb2.ScoreRequest()
        known.CopyFrom(request)
        known.DiscardUnknownFields()
        only_parts = [part for sample in request.samples for message in sample.messages for part in message.parts]
        if known.ByteSize() != request.ByteSize() and not only_parts:
            raise invalid_argument("1000", "unknown")
        super().check(request)


@caught_by("content/unknown-finish-reason")
class ScoresByFinishReason(RightServer):
    def reward_of(self, sample: Sample, company: Sequence[Sample]) -> float:
        return super().reward_of(sample, company) - sample.finish_reason


def _ranges(request: reward_pb2.ScoreRequest) -> Sequence[reward_pb2.TokenRange]:
    return request.samples[0].sampled_ranges if request.samples else ()
