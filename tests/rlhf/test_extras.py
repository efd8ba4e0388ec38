"""What a missing package is answered with."""

from __future__ import annotations

import importlib

import pytest

from rlhf.extras import brought_by


def test_a_missing_package_is_named_with_the_extra_that_brings_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, brought_by("policy"):
        importlib.import_module("no_such_package_anywhere")
    assert ended.value.code == 78
    assert "no_such_package_anywhere" in capsys.readouterr().err


def test_what_is_installed_is_imported() -> None:
    with brought_by("policy"):
        importlib.import_module("json")
