"""Outcomes that are not well formed."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf.reward.v1 import reward_pb2
from tests.reward_server.conformance.broken.marking import caught_by
from tests.reward_server.conformance.right_server import RightServer, Sample, SampleResult


class _Scores(RightServer):
    """Changes what is scored, at the very end."""

    def change(self, scored: reward_pb2.Scored) -> None:
        raise NotImplementedError

    def judge(self, sample: Sample, company: Sequence[Sample], json_keys: Sequence[str]) -> SampleResult:
        result = super().judge(sample, company, json_keys)
        if result.HasField("scored"):
            self.change(result.scored)
        return result


@caught_by("outcomes/set")
class LeavesTheOutcomeUnset(RightServer):
    def judge(self, sample: Sample, company: Sequence[Sample], json_keys: Sequence[str]) -> SampleResult:
        result = super().judge(sample, company, json_keys)
        if result.HasField("abstained"):
            result.ClearField("outcome")
        return result


@caught_by("outcomes/reward-present")
class LeavesTheRewardUnset(_Scores):
    def change(self, scored: reward_pb2.Scored) -> None:
        scored.ClearField("reward")


@caught_by("outcomes/reward-finite")
class NotANumber(_Scores):
    def change(self, scored: reward_pb2.Scored) -> None:
        scored.reward = float("nan")


@caught_by("outcomes/reward-finite")
class MinusInfinityForShortOnes(_Scores):
    def change(self, scored: reward_pb2.Scored) -> None:
        if scored.reward < 1:
            scored.reward = float("-inf")


@caught_by("outcomes/components-finite")
class InfiniteComponent(_Scores):
    def change(self, scored: reward_pb2.Scored) -> None:
        scored.components["odds"] = float("inf")


@caught_by("outcomes/token-rewards-length")
class ForgetsEos(_Scores):
    def change(self, scored: reward_pb2.Scored) -> None:
        del scored.token_rewards[-1:]


@caught_by("outcomes/token-rewards-finite")
class TokenRewardNotANumber(_Scores):
    def change(self, scored: reward_pb2.Scored) -> None:
        scored.token_rewards[0] = float("nan")


@caught_by("outcomes/token-rewards-sampled")
class RewardsTheToolsTokens(_Scores):
    def change(self, scored: reward_pb2.Scored) -> None:
        scored.token_rewards[-1] = 1.0


@caught_by("outcomes/abstained-reason")
class ExplainsAtLength(RightServer):
    def judge(self, sample: Sample, company: Sequence[Sample], json_keys: Sequence[str]) -> SampleResult:
        result = super().judge(sample, company, json_keys)
        if result.HasField("abstained"):
            result.abstained.reason = "é" * 600
        return result


class _Failures(RightServer):
    """Changes the failures of this server's own kind; the contract's keep their codes."""

    def change(self, failed: reward_pb2.Failed) -> None:
        raise NotImplementedError

    def judge(self, sample: Sample, company: Sequence[Sample], json_keys: Sequence[str]) -> SampleResult:
        result = super().judge(sample, company, json_keys)
        if result.HasField("abstained"):
            result.failed.code = "TASTE"
            self.change(result.failed)
        return result


@caught_by("outcomes/failed-code")
class LowerCaseCode(_Failures):
    def change(self, failed: reward_pb2.Failed) -> None:
        failed.code = "matter_of_taste"


@caught_by("outcomes/failed-code")
class LongCode(_Failures):
    def change(self, failed: reward_pb2.Failed) -> None:
        failed.code = "A" * 65


@caught_by("outcomes/failed-message")
class SendsTheTraceback(_Failures):
    def change(self, failed: reward_pb2.Failed) -> None:
        failed.message = "Traceback …" * 200


@caught_by("pending/retry-after")
class PendingWithoutRetryAfter(RightServer):
    def pending(self, sample: Sample) -> SampleResult:
        return SampleResult(sample_id=sample.sample_id, pending=reward_pb2.Pending())


@caught_by("pending/resolved")
class NeverResolves(RightServer):
    def pending(self, sample: Sample) -> SampleResult:
        result = super().pending(sample)
        result.pending.retry_after.seconds = 2**62  # more than a Duration may have
        return result

    def look_up(self, request: reward_pb2.ScoreRequest, sample: Sample) -> SampleResult:
        return self.pending(sample) if self.is_late(sample) else super().look_up(request, sample)
