"""The helper that all tests of real processes lean on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.processes import StartProcess, process_factory, wait_for
from tests.support.scripted_server import SERVICE

MODULE = "tests.support.scripted_server"


def test_a_process_that_dies_is_reported_with_its_log(start_process: StartProcess) -> None:
    process = start_process(MODULE, "--no-such-flag")

    with pytest.raises(AssertionError, match=r"(?s)ended with 78.*--no-such-flag: no such setting"):
        process.wait_serving(SERVICE)


def test_no_process_outlives_its_factory(tmp_path: Path) -> None:
    with process_factory(tmp_path) as start:
        process = start(MODULE)
        process.wait_serving(SERVICE)
        os.kill(process.pid, 0)

    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)


def test_a_process_tells_its_addresses_and_exit_code(start_process: StartProcess) -> None:
    process = start_process(MODULE, "--log-level", "info")
    process.wait_serving()

    assert process.address.startswith("127.0.0.1:")
    assert process.metrics_url.startswith("http://127.0.0.1:")
    assert process.terminate() == 0
    assert "draining" in process.log_text()


def test_waiting_in_vain_names_what_never_came() -> None:
    with pytest.raises(AssertionError, match=r"no sign of life within 0\.1 s"):
        wait_for(lambda: False, within=0.1, what="sign of life")
