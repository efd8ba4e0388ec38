"""python -m policy_server and its client, as people run them."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

import policy_server.__main__
from policy_server import client
from rlhf.weights.v1 import weights_pb2, weights_pb2_grpc
from tests.policy_server.harness import update, version, weights_of
from tests.support.processes import ROOT, StartProcess, process_factory

POLICY = "rlhf.policy.v1.PolicyService"
WEIGHTS = "rlhf.weights.v1.WeightsService"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[StartProcess]:
    with process_factory(tmp_path) as factory:
        yield factory


def test_a_managed_server_waits_serves_its_client_and_leaves_on_sigterm(
    start: StartProcess, tiny_model: Path, other_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = start("policy_server", "--model", str(tiny_model), "--threads", "1", "--managed")
    server.wait_serving(WEIGHTS)
    target = ["--target", server.address]
    hello = ["Hello", "--max-new-tokens", "5", "--seed", "1"]

    assert client.main(["generate", *target, *hello]) == 1
    assert capsys.readouterr().err.startswith("error: UNAVAILABLE: not serving yet: waiting for a trainer")

    with grpc.insecure_channel(server.address) as channel:
        answer = weights_pb2_grpc.WeightsServiceStub(channel).UpdateWeights(
            update(weights_of(other_model), version(1)).messages(), timeout=60
        )
    assert answer.state == weights_pb2.UPDATE_STATE_APPLIED
    server.wait_serving(POLICY)

    as_people_do = [sys.executable, "-m", "policy_server.client", "generate", *target, *hello]
    streamed = subprocess.run(as_people_do, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout
    assert client.main(["generate", *target, *hello, "--n", "2"]) == 0
    assert "--- 0 (seed 1)\n" + streamed in capsys.readouterr().out
    assert client.main(["generate", *target, *hello, "--chat"]) == 0
    assert capsys.readouterr().out != streamed
    assert client.main(["model", *target]) == 0
    assert json.loads(capsys.readouterr().out)["weights"]["version"] == "1"
    assert client.main(["generate", *target, "Hello", "--top-p", "7"]) == 1
    refused = capsys.readouterr()
    assert refused.out == ""
    assert refused.err.startswith("error: INVALID_ARGUMENT: request.sampling.top_p: ")
    assert refused.err.count("\n") == 1

    metrics = server.metrics_text()
    assert 'rlhf_policy_tokens_total{phase="decode"}' in metrics
    assert 'rlhf_policy_weights_info{run_id="run-a"} 1.0' in metrics
    assert 'rlhf_policy_weights_updates_total{outcome="applied"} 1.0' in metrics
    assert 'grpc_method="StreamGenerate"' in metrics
    assert server.terminate() == 0


def test_a_client_without_a_server_says_so_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert client.main(["model", "--target", "127.0.0.1:1", "--timeout", "5"]) == 1

    error = capsys.readouterr().err
    assert error.startswith("error: UNAVAILABLE")
    assert error.count("\n") == 1


def test_a_number_that_no_field_can_hold_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert client.main(["generate", "Hello", "--seed", "-1"]) == 2

    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("argument", ["--help", "--print-config"])
def test_questions_about_settings_are_answered_without_torch(argument: str) -> None:
    script = (
        "import sys, policy_server.__main__ as own\n"
        "try: own.main(sys.argv[1:])\n"
        "finally: assert 'torch' not in sys.modules"
    )
    answer = subprocess.run(
        [sys.executable, "-c", script, "--model", "x", argument], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert answer.returncode == 0, answer.stderr
    assert "max" in answer.stdout


@pytest.mark.parametrize(
    ("flags", "status", "words"),
    [
        (["--model", "no/where"], 78, "cannot load the model"),
        (["--listen", "192.0.2.1:1", "--insecure"], 1, "192.0.2.1:1"),
    ],
)
def test_what_keeps_it_from_starting_is_one_line(
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    status: int,
    words: str,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(policy_server.__main__, "configure_logging", lambda *_: None)

    with pytest.raises(SystemExit) as ended:
        policy_server.__main__.main(["--model", str(tiny_model), *flags])

    assert ended.value.code == status
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("python -m policy_server: ")
    assert words in last


def test_a_taken_port_is_told_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(policy_server.__main__, "configure_logging", lambda *_: None)

    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(SystemExit) as ended:
            policy_server.__main__.main(["--model", "no/where", "--listen", address])

    assert ended.value.code == 1
    assert address in capsys.readouterr().err
