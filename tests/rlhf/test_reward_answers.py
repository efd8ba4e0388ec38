"""Which answers of a reward server a client may use."""

from __future__ import annotations

import math

import pytest

from rlhf.reward.v1 import reward_pb2
from rlhf.reward_answers import MalformedAnswerError, results_by_id


def scored(sample_id: str, reward: float = 1.0, **fields: object) -> reward_pb2.SampleResult:
    return reward_pb2.SampleResult(sample_id=sample_id, scored=reward_pb2.Scored(reward=reward, **fields))  # type: ignore[arg-type]


def test_results_come_by_id_whatever_their_order() -> None:
    answer = reward_pb2.ScoreResponse(results=[scored("b", token_rewards=[0.5, 0.0]), scored("a")])
    results = results_by_id(answer, {"a": 3, "b": 2})
    assert results == {"a": answer.results[1], "b": answer.results[0]}


@pytest.mark.parametrize(
    ("results", "says"),
    [
        ([scored("a")], "'b' is not answered"),
        ([scored("a"), scored("b"), scored("c")], "'c' was not asked for"),
        ([scored("a"), scored("a"), scored("b")], "'a' is answered 2 times"),
        ([scored("a"), scored("b", math.inf)], "'b' has the reward inf"),
        ([scored("a"), scored("b", 1e39)], "'b' .* too large"),
        ([scored("a"), scored("b", token_rewards=[1.0])], "'b' has 1 token rewards for 2 tokens"),
        ([scored("a"), reward_pb2.SampleResult(sample_id="b")], "'b' has no outcome"),
        ([scored("a"), reward_pb2.SampleResult(sample_id="b", pending=reward_pb2.Pending())], "'b' is pending without"),
    ],
)
def test_one_wrong_result_spoils_the_whole_answer(results: list[reward_pb2.SampleResult], says: str) -> None:
    with pytest.raises(MalformedAnswerError, match=says):
        results_by_id(reward_pb2.ScoreResponse(results=results), {"a": 3, "b": 2})
