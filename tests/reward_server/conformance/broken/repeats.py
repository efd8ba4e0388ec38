"""What comes again is judged otherwise."""

from __future__ import annotations

import time
from collections import Counter

from rlhf.reward.v1 import reward_pb2
from tests.reward_server.conformance.broken.marking import NeedsTiming, NeverLate, caught_by, renamed
from tests.reward_server.conformance.right_server import RightServer, Sample, SampleResult


@caught_by("repeats/final-stays-final")
class ChangesItsMind(RightServer):
    def repeat(self, result: SampleResult) -> SampleResult:
        if result.HasField("scored"):
            return result
        return SampleResult(sample_id=result.sample_id, scored=reward_pb2.Scored(reward=0.0))


@caught_by("repeats/same-answer")
class JudgesARepeatAnew(RightServer):
    charged = 0

    def repeat(self, result: SampleResult) -> SampleResult:
        again = renamed(result, result.sample_id)
        if again.HasField("scored"):
            self.charged += 1
            again.scored.reward += self.charged
        return again


@caught_by("repeats/other-company")
class RemembersPlacesInTheCall(NeverLate):
    """Judges anew, with noise, what comes again at another place."""

    def look_up(self, request: reward_pb2.ScoreRequest, sample: Sample) -> SampleResult:
        result = renamed(super().look_up(request, sample), sample.sample_id)
        if result.HasField("scored"):
            result.scored.reward += list(request.samples).index(sample) * 1e-9
        return result


@caught_by("repeats/at-once")
class SharesNothingBetweenCalls(NeverLate):
    """A small call beside others computes for itself, with noise."""

    hold_seconds = 0.02
    drawn = 0

    def look_up(self, request: reward_pb2.ScoreRequest, sample: Sample) -> SampleResult:
        if self.open_calls == 1 or len(request.samples) > 4:
            return super().look_up(request, sample)
        self.drawn += 1
        result = self.judge(sample, [sample], request.json_metadata_keys)
        if result.HasField("scored"):
            result.scored.reward += self.drawn * 1e-9
        return result


@caught_by("repeats/other-content")
class TakesOtherContentForTheOld(RightServer):
    def clash(self, sample: Sample, result: SampleResult) -> SampleResult:
        old = renamed(result, sample.sample_id)
        # Those of the old content's tokens would be too many or too few, which is another case's to say.
        if old.HasField("scored"):
            old.scored.ClearField("token_rewards")
        return old


@caught_by("repeats/other-content")
class RemembersByIdAlone(TakesOtherContentForTheOld):
    remembers_seconds = 0


@caught_by("pending/asked-early")
class LosesPatience(NeedsTiming):
    """A sample that takes a while has failed when it is asked for too often meanwhile."""

    takes_seconds = 0.2
    most_early = 4  # several calls at once are in order

    def __init__(self) -> None:
        super().__init__()
        self._began: dict[str, float] = {}
        self._early: Counter[str] = Counter()

    def look_up(self, request: reward_pb2.ScoreRequest, sample: Sample) -> SampleResult:
        if not sample.completion.startswith("Dull"):
            return super().look_up(request, sample)
        now = time.monotonic()
        early = now < self._began.setdefault(sample.sample_id, now) + self.takes_seconds
        self._early[sample.sample_id] += early
        if self._early[sample.sample_id] > self.most_early:
            self.showed = True
            return SampleResult(sample_id=sample.sample_id, failed=reward_pb2.Failed(code="IMPATIENT"))
        return self.pending(sample) if early else super().look_up(request, sample)

    def pending(self, sample: Sample) -> SampleResult:
        result = super().pending(sample)
        result.pending.retry_after.FromMilliseconds(round(self.takes_seconds * 1000))
        return result

    def is_late(self, sample: Sample) -> bool:
        return False


@caught_by("repeats/other-run")
class MixesRuns(RightServer):
    def look_up(self, request: reward_pb2.ScoreRequest, sample: Sample) -> SampleResult:
        one_for_all = reward_pb2.ScoreRequest()
        one_for_all.CopyFrom(request)
        one_for_all.run_id = "every run"
        return super().look_up(one_for_all, sample)
