"""compose.yaml is what the Compose Specification takes, and its containers get what their processes take."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
import yaml

from rlhf.config import load_settings
from tests.manifests.schemas import source_of
from tests.manifests.test_settings import SETTINGS
from tests.support.processes import ROOT

COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
SPECIFICATION = "github.com/compose-spec/compose-go/v2@v2.9.0"


def test_it_keeps_to_the_specification() -> None:
    schema = json.loads((source_of(SPECIFICATION) / "schema" / "compose-spec.json").read_text())

    jsonschema.Draft7Validator(schema).validate(COMPOSE)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_process_takes_the_settings_that_its_container_has(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    service = COMPOSE["services"][name]
    mounted = dict(reversed(volume.removesuffix(":ro").split(":")) for volume in service["volumes"])
    for variable, value in service["environment"].items():
        monkeypatch.setenv(variable, value)
    arguments = [str(ROOT / mounted[text]) if text in mounted else text for text in service["command"]]

    settings = load_settings(SETTINGS[name], arguments, prog=name)

    assert settings.metrics_port == 9100


def test_every_file_that_is_mounted_is_there() -> None:
    for service in COMPOSE["services"].values():
        sources = [volume.split(":")[0] for volume in service.get("volumes", ())]
        assert [source for source in sources if source not in COMPOSE["volumes"] and not (ROOT / source).exists()] == []
        assert [each["source"] for each in service.get("configs", ()) if each["source"] not in COMPOSE["configs"]] == []
