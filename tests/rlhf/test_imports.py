from __future__ import annotations

import os
import subprocess
import sys

import pytest

PLUMBING = (
    "rlhf.channel, rlhf.config, rlhf.endpoint, rlhf.failures, rlhf.interceptor, rlhf.logs, rlhf.metrics, rlhf.server"
)
STUBS = "rlhf.policy.v1.policy_pb2_grpc, rlhf.reward.v1.reward_pb2_grpc, rlhf.weights.v1.weights_pb2_grpc"


def test_a_reward_author_never_imports_torch_or_what_comes_with_it() -> None:
    code = f"import sys, {PLUMBING}, {STUBS}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()

    assert not {"torch", "numpy", "transformers", "safetensors", "xxhash"} & set(loaded)


def test_the_page_of_a_run_is_made_without_torch() -> None:
    code = "import sys, trainer.report.__main__, trainer.report.page; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()

    assert "trainer.report.page" in loaded
    assert not {"torch", "numpy", "transformers", "grpc"} & set(loaded)


@pytest.mark.parametrize(("given", "expected"), [(None, "ERROR"), ("debug", "debug")])
def test_grpc_is_quiet_unless_the_user_wants_it_otherwise(given: str | None, expected: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}
    if given is not None:
        environment["GRPC_VERBOSITY"] = given
    code = "import os, rlhf; print(os.environ['GRPC_VERBOSITY'])"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)

    assert result.stdout.strip() == expected
