"""What Grafana needs of a dashboard before any data; tests/integration/test_dashboards.py has the data."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import ROOT

FILES = sorted((ROOT / "k8s" / "monitoring" / "dashboards").glob("*.json"))


def test_there_is_one_for_training_rollout_and_rewards_under_a_name_that_stays() -> None:
    assert [json.loads(file.read_text())["uid"] for file in FILES] == ["rlhf-rewards", "rlhf-rollout", "rlhf-training"]
    assert [file.stem for file in FILES] == ["rlhf-rewards", "rlhf-rollout", "rlhf-training"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_query_goes_to_the_chosen_datasource_and_uses_only_variables_that_exist(file: Path) -> None:
    dashboard: dict[str, Any] = json.loads(file.read_text())
    variables = dashboard["templating"]["list"]
    known = {variable["name"] for variable in variables} | {"__rate_interval"}

    assert variables[0]["name"] == "datasource"
    assert variables[0]["type"] == "datasource"
    asked = [target for panel in dashboard["panels"] for target in panel.get("targets", [])]
    assert len(asked) > 15
    for part in [*asked, *variables[1:]]:
        assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    texts = [target["expr"] for target in asked] + [variable["query"]["query"] for variable in variables[1:]]
    assert {name for text in texts for name in re.findall(r"\$(\w+)", text)} <= known


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_panels_have_names_and_places_of_their_own(file: Path) -> None:
    panels = json.loads(file.read_text())["panels"]
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({panel["title"] for panel in panels}) == len(panels)


def test_what_is_made_is_what_its_source_makes() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "monitoring.py", "--check"], capture_output=True, text=True, timeout=60
    )

    assert done.returncode == 0, done.stderr
