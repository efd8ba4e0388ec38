from __future__ import annotations

import pytest
from rlhf.reward.v1 import reward_pb2

from request import violations


def sample(name: str, **fields: object) -> reward_pb2.Sample:
    return reward_pb2.Sample(**{"sample_id": name, "group_id": "g", **fields})  # type: ignore[arg-type]


def request(*samples: reward_pb2.Sample, run_id: str = "run") -> reward_pb2.ScoreRequest:
    return reward_pb2.ScoreRequest(run_id=run_id, samples=samples)


def ranged(*bounds: tuple[int, int]) -> reward_pb2.Sample:
    spans = [reward_pb2.TokenRange(first=first, past_last=past_last) for first, past_last in bounds]
    return sample("a", completion_token_ids=[1, 2, 3], sampled_ranges=spans)


@pytest.mark.parametrize(
    ("bad", "wrong"),
    [
        (request(sample("a"), run_id=""), ["run_id"]),
        (request(sample("a"), run_id="é" * 129), ["run_id"]),
        (request(), ["samples"]),
        (request(*(sample(str(number)) for number in range(257))), ["samples"]),
        (request(sample("a"), sample("")), ["samples[1].sample_id"]),
        (request(sample("a" * 257)), ["samples[0].sample_id"]),
        (request(sample("a"), sample("b"), sample("a")), ["samples[2].sample_id"]),
        (request(sample("a", group_id="")), ["samples[0].group_id"]),
        (request(ranged((0, 4))), ["samples[0].sampled_ranges[0].past_last"]),
        (request(ranged((1, 1))), ["samples[0].sampled_ranges[0].past_last"]),
        (request(ranged((0, 2), (1, 3))), ["samples[0].sampled_ranges[1].first"]),
        (request(ranged((2, 3), (0, 1))), ["samples[0].sampled_ranges[1].first"]),
        (request(sample("", group_id=""), run_id=""), ["run_id", "samples[0].sample_id", "samples[0].group_id"]),
    ],
)
def test_every_wrong_field_is_named_by_its_path(bad: reward_pb2.ScoreRequest, wrong: list[str]) -> None:
    assert [violation.field for violation in violations(bad)] == wrong


def test_a_request_at_the_limits_is_right() -> None:
    most = [sample(str(number).rjust(256)) for number in range(255)]
    assert not list(violations(request(*most, ranged((0, 2), (2, 3)), run_id="r" * 256)))


def test_a_description_names_the_value_and_the_limit() -> None:
    (wrong,) = violations(request(sample("a"), run_id="r" * 300))
    assert "300" in wrong.description
    assert "256" in wrong.description
