"""scripts/protos.py on copies of the contract: it sees drift, and a break of what was released."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.contract.conftest import PROTOS, ROOT

_POLICY = "protos/rlhf/policy/v1/policy.proto"
_FIELD = "  uint32 max_completions = 14;\n"
_ADDED = "  bool new = 99;\n"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of protos/ and the committed stubs."""
    shutil.copytree(PROTOS, tmp_path / "protos")
    for folder in ("policy", "weights", "reward"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "rlhf" / folder, tmp_path / "rlhf" / folder, ignore=ignored)
    return tmp_path


@pytest.fixture
def released(copy: Path) -> Path:
    """The copy as a repository whose only commit is v0.1.0."""
    _git(copy, "init", "--quiet")
    _git(copy, "add", ".")
    _git(copy, "commit", "--quiet", "--message", "Release")
    _git(copy, "tag", "v0.1.0")
    return copy


def test_the_committed_stubs_are_what_the_generator_emits() -> None:
    done = _protos("--check")
    assert done.returncode == 0, done.stderr


def test_a_changed_proto_is_drift_and_the_fix_is_named(copy: Path) -> None:
    _replace(
        copy / _POLICY, "uint32 max_context_tokens = 9;", "uint32 max_context_tokens = 9;\n  // New.\n  bool new = 99;"
    )
    done = _protos("--check", "--root", copy)
    assert done.returncode == 1
    assert "rlhf/policy/v1/policy_pb2.py " in done.stderr
    assert "make protos" in done.stderr


def test_stubs_without_a_proto_are_drift_and_are_removed(copy: Path) -> None:
    left_over = copy / "rlhf" / "policy" / "v1" / "gone_pb2.py"
    left_over.touch()
    assert _protos("--check", "--root", copy).returncode == 1
    assert _protos("--root", copy).returncode == 0
    assert not left_over.exists()
    assert _protos("--check", "--root", copy).returncode == 0


def test_a_removed_field_breaks_the_release(released: Path) -> None:
    _replace(released / _POLICY, _FIELD, "")
    done = _protos("--breaking", "--root", released)
    assert done.returncode == 1
    assert "max_completions" in done.stdout + done.stderr
    assert "v0.1.0" in done.stderr


def test_an_added_field_does_not_break_the_release(released: Path) -> None:
    _replace(released / _POLICY, _FIELD, _FIELD + _ADDED)
    done = _protos("--breaking", "--root", released)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_break_is_measured_against_the_newest_release(released: Path) -> None:
    _replace(released / _POLICY, _FIELD, _FIELD + _ADDED)
    _git(released, "commit", "--quiet", "--all", "--message", "Add a field")
    for tag in ("v0.9.0", "v0.10.0"):
        _git(released, "tag", tag)
    _replace(released / _POLICY, _ADDED, "")
    done = _protos("--breaking", "--root", released)
    assert done.returncode == 1
    assert "v0.10.0" in done.stderr


def test_without_a_release_nothing_can_break(copy: Path) -> None:
    _git(copy, "init", "--quiet")
    done = _protos("--breaking", "--root", copy)
    assert done.returncode == 0
    assert "no release tag" in done.stdout


def _protos(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "scripts" / "protos.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=_environment())


def _git(folder: Path, *arguments: str) -> None:
    subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, env=_environment())


def _environment() -> dict[str, str]:
    """Git as on a bare machine: no settings of the user's, and no repository around the folder."""
    person = {
        f"GIT_{role}_{what}": "test@example.com" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
    }
    ambient = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    return ambient | person | {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}


def _replace(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert text.count(old) == 1
    file.write_text(text.replace(old, new))
