"""`python -m reward_server` as a real process."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import grpc
import pytest

from rlhf.reward.v1 import reward_pb2_grpc
from tests.reward_server.conftest import request, sample
from tests.support.processes import ROOT, process_factory, wait_for

SERVICE = "rlhf.reward.v1.RewardService"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "reward_server", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


def test_it_serves_scores_metrics_and_stops_cleanly(tmp_path: Path) -> None:
    with process_factory(tmp_path) as start:
        server = start("reward_server", "--reward", "regex", "--reward-options", '{"pattern": "good"}')
        server.wait_serving(SERVICE)
        with grpc.insecure_channel(server.address) as channel:
            stub = reward_pb2_grpc.RewardServiceStub(channel)
            results = stub.Score(request(sample("a", "good"), sample("b", "bad")), timeout=10).results
        assert [result.scored.reward for result in results] == [1.0, 0.0]
        text = server.metrics_text()
        assert 'rlhf_reward_outcomes_total{code="",component="",kind="function",outcome="scored"} 2.0' in text
        assert "grpc_server_handled_total" in text
        (line,) = [line for line in server.log_text().splitlines() if "serving" in line]
        assert server.address in line
        assert server.metrics_url in line
        assert server.terminate() == 0


def test_a_running_call_finishes_when_the_server_is_told_to_stop(tmp_path: Path) -> None:
    marker = tmp_path / "started"
    file = tmp_path / "slow_reward.py"
    file.write_text(
        "import pathlib, time\n"
        "def slow(completions):\n"
        f"    pathlib.Path({str(marker)!r}).touch()\n"
        "    time.sleep(1.0)\n"
        "    return [1.0] * len(completions)\n"
    )
    with process_factory(tmp_path) as start:
        server = start("reward_server", "--reward", f"{file}:slow", "--drain-seconds", "0")
        server.wait_serving(SERVICE)
        with grpc.insecure_channel(server.address) as channel:
            call = reward_pb2_grpc.RewardServiceStub(channel).Score.future(request(sample("a")), timeout=20)
            wait_for(marker.exists, within=10, what="start of the reward function")
            assert server.terminate() == 0
            assert call.result().results[0].scored.reward == 1.0


def test_a_function_that_hangs_does_not_keep_a_stopped_server_alive(tmp_path: Path) -> None:
    marker = tmp_path / "started"
    file = tmp_path / "hanging_reward.py"
    file.write_text(
        "import pathlib, threading\n"
        "def hang(completions):\n"
        f"    pathlib.Path({str(marker)!r}).touch()\n"
        "    threading.Event().wait()\n"
    )
    with process_factory(tmp_path) as start:
        server = start("reward_server", "--reward", f"{file}:hang", "--drain-seconds", "0", "--grace-seconds", "0.2")
        server.wait_serving(SERVICE)
        with grpc.insecure_channel(server.address) as channel:
            call = reward_pb2_grpc.RewardServiceStub(channel).Score.future(request(sample("a")), timeout=20)
            wait_for(marker.exists, within=10, what="start of the reward function")
            began = time.monotonic()
            assert server.terminate() == 0
            assert time.monotonic() - began < 30
            assert isinstance(call.exception(), grpc.RpcError)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--reward", "vadar"], "Did you mean 'vader'"),
        (["--reward", "regex"], "pattern"),
        (["--reward", "regex", "--reward-options", "[1]"], "dictionary"),
        (["--reward", "no-such.yaml"], "no-such.yaml: No such file"),
        (["--reward", "compsite"], "Did you mean 'composite'"),
        ([], "reward"),
    ],
)
def test_a_mistake_at_the_start_is_explained(arguments: list[str], says: str) -> None:
    result = run(*arguments)
    assert result.returncode == 78
    assert says in result.stderr
    assert "Traceback" not in result.stderr


def test_a_taken_port_is_no_mistake_in_the_settings() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        result = run("--reward", "length", "--reward-options", "target: 3", "--listen", address)
    assert result.returncode == 1
    assert f"can't listen on {address}" in result.stderr
    assert "Traceback" not in result.stderr


def test_serving_a_reward_needs_no_torch() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'numpy', 'transformers'])); "
        "import reward_server.__main__, reward_server.service; "
        "from reward_server.kinds.loading import load_function; load_function('length', {'target': 3})"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


def test_print_config_shows_the_options_as_a_mapping() -> None:
    result = run("--reward", "length", "--reward-options", "target: 20", "--print-config")
    assert result.returncode == 0
    assert "target: 20" in result.stdout


def test_what_is_found_wrong_when_the_reward_starts_ends_the_process_with_the_reason(tmp_path: Path) -> None:
    state = tmp_path / "moments.json"
    state.write_text("[]")
    mix = tmp_path / "mix.yaml"
    mix.write_text(
        f"state_file: {state}\ncomponents: [{{name: a, reward: length, options: {{target: 3}}, normalise: running}}]\n"
    )
    result = run("--reward", str(mix), "--listen", "127.0.0.1:0")
    assert result.returncode == 78
    assert "does not hold running moments" in result.stderr
    assert "Traceback" not in result.stderr
