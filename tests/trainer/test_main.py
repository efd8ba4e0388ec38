"""What a start of the trainer answers its caller."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path


def test_a_taken_metrics_port_is_told_and_worth_another_start(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        settings = {
            "model": "model",
            "policy-server": "127.0.0.1:1",
            "reward-server": "127.0.0.1:2",
            "run-dir": str(tmp_path / "run"),
            "data": "data.jsonl",
            "metrics-port": str(port),
        }
        flags = [part for name, value in settings.items() for part in (f"--{name}", value)]
        ended = subprocess.run(
            [sys.executable, "-m", "trainer", *flags], capture_output=True, text=True, timeout=120, check=False
        )

    assert ended.returncode == 1
    assert f"can't serve metrics on 127.0.0.1:{port}" in ended.stderr
    assert "Traceback" not in ended.stderr
