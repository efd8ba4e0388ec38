"""The script of components/model-cache beside a cache that is being filled."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
from huggingface_hub import constants

from tests.manifests.kustomize import K8S

COMMIT = "0" * 40


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("models", K8S / "components" / "model-cache" / "models.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def settings(tmp_path: Path) -> str:
    file = tmp_path / "policy.yaml"
    file.write_text("model: somebody/model\nreference: /models/reference\n")
    return str(file)


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a model of two files that somebody began to fetch: its weights are missing."""
    cache = tmp_path / "hub" / "models--somebody--model"
    made = cache / "snapshots" / COMMIT
    for folder in (made, cache / "refs", cache / "trees"):
        folder.mkdir(parents=True)
    (cache / "refs" / "main").write_text(COMMIT)
    files = {name: {"size": 1, "blob_id": COMMIT} for name in ("config.json", "model.safetensors", "model.bin")}
    (cache / "trees" / f"{COMMIT}.json").write_text(json.dumps({"format_version": 1, "files": files}))
    (made / "config.json").write_text("{}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return made


def test_it_waits_until_the_last_file_of_a_model_is_there(
    script: ModuleType, settings: str, snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: (snapshot / "model.safetensors").write_text("weights"))

    assert script.main(["wait", settings]) == 0
    assert (snapshot / "model.safetensors").exists()


def test_it_gives_up_by_name_when_nobody_fetches_the_model(
    script: ModuleType,
    settings: str,
    snapshot: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(script, "PATIENCE_SECONDS", 0.01)
    monkeypatch.setattr(script, "POLL_SECONDS", 0.01)

    assert script.main(["wait", settings]) == 1
    assert "somebody/model is still not in the cache" in capsys.readouterr().err


def test_what_is_fetched_is_what_the_settings_name_without_other_formats(
    script: ModuleType, settings: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(
        script, "snapshot_download", lambda name, *, ignore_patterns: asked.append((name, ignore_patterns))
    )

    assert script.main(["fetch", settings]) == 0
    ((name, left_out),) = asked
    assert name == "somebody/model"
    assert "*.bin" in left_out
