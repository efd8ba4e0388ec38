from __future__ import annotations

from typing import Any

import pytest
import torch

from trainer.learning.batch import RolloutBatch


def fields(**changes: Any) -> dict[str, Any]:
    return {
        "queries": [torch.tensor([1, 2]), torch.tensor([3])],
        "responses": [torch.tensor([4]), torch.tensor([5, 6])],
        "scores": torch.tensor([0.5, -0.5]),
        **changes,
    }


def test_ragged_rows_make_a_batch() -> None:
    assert len(RolloutBatch(**fields())) == 2


empty = torch.tensor([], dtype=torch.int64)
nan = float("nan")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"queries": []}, "queries is empty"),
        ({"responses": [torch.tensor([4])]}, "responses has 1 rows, queries has 2"),
        ({"responses": [torch.tensor([4]), empty]}, r"responses\[1\] is empty"),
        ({"queries": [empty, torch.tensor([3])]}, r"queries\[0\] is empty"),
        ({"queries": [torch.tensor([[1]]), torch.tensor([3])]}, r"queries\[0\] has shape \[1, 1\]"),
        ({"queries": [torch.tensor([1.0]), torch.tensor([3])]}, r"queries\[0\] is torch.float32"),
        ({"scores": torch.tensor([1.0])}, r"scores has shape \[1\]"),
        ({"scores": torch.tensor([1.0, nan])}, r"scores\[1\] is nan"),
        ({"response_masks": [torch.ones(1)]}, "response_masks has 1 rows"),
        ({"response_masks": [torch.ones(1), torch.ones(1)]}, r"response_masks\[1\] has shape \[1\]"),
        ({"response_masks": [torch.ones(1), torch.zeros(2)]}, r"response_masks\[1\] is all 0"),
        ({"response_masks": [torch.ones(1), torch.tensor([0.5, 1.0])]}, r"response_masks\[1\] holds something other"),
        ({"token_rewards": [torch.tensor([nan]), torch.zeros(2)]}, r"token_rewards\[0\]\[0\] is nan"),
        ({"reference_logprobs": [torch.zeros(1), torch.zeros(3)]}, r"reference_logprobs\[1\] has shape \[3\]"),
        (
            {"rollout_logprobs": [torch.zeros(1), torch.tensor([0.0, -float("inf")])]},
            r"rollout_logprobs\[1\]\[1\] is -inf",
        ),
        ({"staleness": torch.tensor([0, -1])}, r"staleness is \[0, -1\]"),
        ({"staleness": torch.tensor([1])}, r"staleness is \[1\]: it must be 2 numbers"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RolloutBatch(**fields(**changes))
