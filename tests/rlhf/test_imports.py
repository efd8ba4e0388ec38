from __future__ import annotations

import subprocess
import sys

PLUMBING = (
    "rlhf.channel, rlhf.config, rlhf.endpoint, rlhf.failures, rlhf.interceptor, rlhf.logs, rlhf.metrics, rlhf.server"
)
STUBS = "rlhf.policy.v1.policy_pb2_grpc, rlhf.reward.v1.reward_pb2_grpc, rlhf.weights.v1.weights_pb2_grpc"


def test_a_reward_author_never_imports_torch_or_what_comes_with_it() -> None:
    code = f"import sys, {PLUMBING}, {STUBS}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()

    assert not {"torch", "numpy", "transformers", "safetensors", "xxhash"} & set(loaded)
