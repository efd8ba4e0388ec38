"""Groups."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf.failures import invalid_argument
from rlhf.reward.v1 import reward_pb2
from tests.reward_server.conformance.broken.marking import caught_by
from tests.reward_server.conformance.right_server import RightGroupServer, RightServer, Sample, SampleResult


@caught_by("groups/ignored")
class LooksAtGroupSize(RightServer):
    def reward_of(self, sample: Sample, company: Sequence[Sample]) -> float:
        return super().reward_of(sample, company) / max(1, sample.group_size)


@caught_by("groups/part")
class TakesAPartOfAGroup(RightGroupServer):
    def check_groups(self, request: reward_pb2.ScoreRequest) -> None:
        if [sample.group_size for sample in request.samples] != [2]:
            super().check_groups(request)


@caught_by("groups/sizes-differ")
class TakesTheFirstGroupSize(RightGroupServer):
    def check_groups(self, request: reward_pb2.ScoreRequest) -> None:
        if [sample.group_size for sample in request.samples] != [2, 3]:
            super().check_groups(request)


@caught_by("groups/size-zero")
class NeedsAGroupSize(RightGroupServer):
    def check_groups(self, request: reward_pb2.ScoreRequest) -> None:
        super().check_groups(request)
        if not request.samples[0].group_size:
            raise invalid_argument("samples[0].group_size", "required")


@caught_by("groups/company")
class ComparesGroupsWithEachOther(RightGroupServer):
    def look_up(self, request: reward_pb2.ScoreRequest, sample: Sample) -> SampleResult:
        self._groups = len({each.group_id for each in request.samples})
        return super().look_up(request, sample)

    def reward_of(self, sample: Sample, company: Sequence[Sample]) -> float:
        return super().reward_of(sample, company) + self._groups


@caught_by("groups/pending-together")
class PendingInPart(RightGroupServer):
    def is_late(self, sample: Sample) -> bool:
        return super().is_late(sample) and sample.completion.endswith(".")
