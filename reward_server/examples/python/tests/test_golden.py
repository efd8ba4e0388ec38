from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rlhf.reward.v1 import reward_pb2

from service import judge

GOLDEN = Path(__file__).parents[4] / "tests" / "reward_server" / "examples" / "golden" / "vectors.json"
VECTORS = json.loads(GOLDEN.read_text())


@pytest.mark.parametrize("vector", VECTORS, ids=[vector["id"] for vector in VECTORS])
def test_it_comes_out_to_the_last_bit(vector: dict[str, Any]) -> None:
    sample = reward_pb2.Sample(
        sample_id=vector["id"], group_id="g", completion=vector["completion"], metadata=vector["metadata"]
    )
    result = judge(sample, frozenset(vector["json_metadata_keys"]))
    assert result.WhichOneof("outcome") == vector["outcome"]
    if vector["outcome"] == "failed":
        assert result.failed.code == vector["code"]
    else:
        # As text, because == does not tell 0.0 from -0.0.
        assert repr(result.scored.reward) == repr(vector["reward"])
        assert repr(dict(sorted(result.scored.components.items()))) == repr(dict(sorted(vector["components"].items())))
