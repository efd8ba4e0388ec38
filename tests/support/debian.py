"""Programs of the machine's that some tests need: without them they are skipped, but in CI, which installs them."""

from __future__ import annotations

import os

import pytest


def required(path: str | None, package: str) -> str:
    """`path`, which was looked for; when it was not found the test is skipped, or fails in CI."""
    if path:
        return path
    message = f"this test needs Debian's package {package}: apt-get install -y {package}"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)
