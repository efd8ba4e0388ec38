"""What a start of the trainer answers its caller."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

from tests.support.processes import as_flags


def test_a_taken_metrics_port_is_told_and_worth_another_start(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        settings = {
            "model": "model",
            "policy_server": "127.0.0.1:1",
            "reward_server": "127.0.0.1:2",
            "run_dir": tmp_path / "run",
            "data": "data.jsonl",
            "metrics_port": port,
        }
        command = [sys.executable, "-m", "trainer", *as_flags(settings)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    assert ended.returncode == 1
    assert f"can't serve metrics on 127.0.0.1:{port}" in ended.stderr
    assert "Traceback" not in ended.stderr
