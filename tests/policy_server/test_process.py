"""python -m policy_server and its client, as people run them."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes import ROOT, ProcessUnderTest, StartProcess, process_factory

POLICY = "rlhf.policy.v1.PolicyService"
WEIGHTS = "rlhf.weights.v1.WeightsService"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[StartProcess]:
    with process_factory(tmp_path) as factory:
        yield factory


def client(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "policy_server.client", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_server_answers_its_client_and_leaves_on_sigterm(start: StartProcess, tiny_model: Path) -> None:
    server: ProcessUnderTest = start("policy_server", "--model", str(tiny_model), "--threads", "1")
    server.wait_serving(POLICY)
    target = ("--target", server.address)

    streamed = client("generate", *target, "Hello", "--max-new-tokens", "5", "--seed", "1")
    several = client("generate", *target, "Hello", "--max-new-tokens", "5", "--seed", "1", "--n", "2")
    chat = client("generate", *target, "Hello", "--max-new-tokens", "5", "--chat", "--temperature", "0")
    model = client("model", *target)
    refused = client("generate", *target, "Hello", "--top-p", "7")
    metrics = urllib.request.urlopen(server.metrics_url, timeout=10).read().decode()

    assert streamed.returncode == several.returncode == chat.returncode == 0, streamed.stderr
    assert "--- 0 (seed 1)\n" + streamed.stdout in several.stdout
    assert json.loads(model.stdout)["vocab_size"] == 257
    assert refused.returncode == 1
    assert refused.stdout == ""
    assert refused.stderr.startswith("error: INVALID_ARGUMENT: request.sampling.top_p: ")
    assert refused.stderr.count("\n") == 1
    assert 'rlhf_policy_tokens_total{phase="decode"}' in metrics
    assert 'grpc_method="StreamGenerate"' in metrics
    assert server.terminate() == 0


def test_a_managed_server_can_be_published_to_while_it_does_not_serve(start: StartProcess, tiny_model: Path) -> None:
    server: ProcessUnderTest = start("policy_server", "--model", str(tiny_model), "--threads", "1", "--managed")
    server.wait_serving(WEIGHTS)

    refused = client("generate", "--target", server.address, "Hello")

    assert refused.returncode == 1
    assert refused.stderr.startswith("error: UNAVAILABLE: not serving yet: waiting for a trainer")
    assert server.terminate() == 0


def test_a_client_without_a_server_says_so_in_one_line() -> None:
    answer = client("model", "--target", "127.0.0.1:1", "--timeout", "5")

    assert answer.returncode == 1
    assert answer.stderr.startswith("error: UNAVAILABLE")
    assert answer.stderr.count("\n") == 1


@pytest.mark.parametrize("argument", ["--help", "--print-config"])
def test_questions_about_settings_are_answered_without_torch(argument: str) -> None:
    script = (
        "import sys, policy_server.__main__ as m\ntry: m.main(sys.argv[1:])\nfinally: assert 'torch' not in sys.modules"
    )
    answer = subprocess.run(
        [sys.executable, "-c", script, "--model", "x", argument], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert answer.returncode == 0, answer.stderr
    assert "max" in answer.stdout


def test_a_model_that_does_not_exist_ends_the_process_with_one_line(tmp_path: Path) -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "policy_server", "--model", str(tmp_path / "nothing")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert answer.returncode == 78
    assert "Traceback" not in answer.stderr
    assert "nothing" in answer.stderr
