"""Where the tests run."""

from __future__ import annotations

import subprocess
import sys


def test_no_process_of_a_test_sees_a_gpu() -> None:
    program = "import os; print(repr(os.environ['CUDA_VISIBLE_DEVICES']))"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "''"
