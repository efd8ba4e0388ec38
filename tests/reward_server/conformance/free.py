"""Servers that keep the contract, each by another use of what it leaves open."""

from __future__ import annotations

import random
from collections.abc import Sequence

from rlhf.reward.v1 import reward_pb2
from tests.reward_server.conformance.right_server import RightGroupServer, RightServer, Sample, SampleResult


class AnswersInAnyOrder(RightServer):
    def finish(self, request: reward_pb2.ScoreRequest, results: list[SampleResult]) -> list[SampleResult]:
        return random.sample(results, len(results))


class DeclaresNothing(RightServer):
    """No limit, no scope, no column and no token ids."""

    scope = reward_pb2.SCOPE_UNSPECIFIED
    max_samples = 0
    max_concurrent_calls = 0
    required_metadata = ()
    needs_token_ids = False


class DeclaresMoreThanARequestHolds(RightServer):
    max_samples = 2**32 - 1


class OneAtATime(RightServer):
    max_samples = 1
    max_concurrent_calls = 1


class GroupsOfOne(RightGroupServer):
    max_samples = 1


class RemembersNothing(RightServer):
    """What comes again waits again, and is judged anew, with the noise of a network that computes in other company."""

    memory_samples = 0
    remembers_seconds = 0

    def look_up(self, request: reward_pb2.ScoreRequest, sample: Sample) -> SampleResult:
        key = (request.run_id, sample.sample_id)
        result = super().look_up(request, sample)
        if not result.HasField("pending"):
            self._seen.discard(key)
        return result

    def reward_of(self, sample: Sample, company: Sequence[Sample]) -> float:
        return super().reward_of(sample, company) * random.uniform(0.999, 1.001)


class RemembersSome(RightServer):
    """A clash for some ids of a call, and another judgement for the rest."""

    memory_samples = 1
    remembers_seconds = 0


class LikesEverythingTheSame(RightServer):
    def reward_of(self, sample: Sample, company: Sequence[Sample]) -> float:
        return 0.0


class AbstainsFromEverything(RightServer):
    def judge(self, sample: Sample, company: Sequence[Sample], json_keys: Sequence[str]) -> SampleResult:
        result = super().judge(sample, company, json_keys)
        if result.HasField("scored"):
            result.abstained.SetInParent()
        return result


class EverythingIsLate(RightServer):
    def is_late(self, sample: Sample) -> bool:
        return True


FREE: Sequence[type[RightServer]] = (
    AnswersInAnyOrder,
    DeclaresNothing,
    DeclaresMoreThanARequestHolds,
    OneAtATime,
    GroupsOfOne,
    RemembersNothing,
    RemembersSome,
    LikesEverythingTheSame,
    AbstainsFromEverything,
    EverythingIsLate,
)
