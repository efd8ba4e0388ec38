"""The rules do what they say, and each alert leads to its section of the runbook."""

from __future__ import annotations

import re
import subprocess
from typing import Any

import yaml

from tests.support.processes import ROOT
from tests.support.prometheus import promtool

FOLDER = ROOT / "k8s" / "monitoring"
RULES: list[dict[str, Any]] = [
    rule for group in yaml.safe_load((FOLDER / "rules.yaml").read_text())["groups"] for rule in group["rules"]
]
ALERTS = [rule for rule in RULES if "alert" in rule]
RUNBOOK = (ROOT / "docs" / "runbook.md").read_text()


def test_promtool_accepts_the_rules_and_their_tests_pass() -> None:
    for command in ("check", "rules.yaml"), ("test", "rules_test.yaml"):
        done = subprocess.run(
            [promtool(), command[0], "rules", FOLDER / command[1]], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested_where_it_fires_and_where_it_is_quiet() -> None:
    seen: dict[str, set[bool]] = {}
    for test in yaml.safe_load((FOLDER / "rules_test.yaml").read_text())["tests"]:
        for case in test["promql_expr_test"]:
            match = re.fullmatch(r'count\(ALERTS\{alertname="(\w+)", alertstate="firing"\}\)', case["expr"])
            assert match, case["expr"]
            seen.setdefault(match[1], set()).add(bool(case["exp_samples"]))

    assert seen == {rule["alert"]: {True, False} for rule in ALERTS}


def test_every_alert_has_a_section_of_the_runbook_and_every_section_an_alert() -> None:
    linked = [rule["annotations"]["runbook_url"] for rule in ALERTS]
    sections = re.findall(r"^## (.+)$", RUNBOOK, re.MULTILINE)

    assert linked == [f"docs/runbook.md#{rule['alert'].lower()}" for rule in ALERTS]
    assert sorted(sections) == sorted(rule["alert"] for rule in ALERTS)
    assert set(re.findall(r"\]\(#(\w+)\)", RUNBOOK)) <= {section.lower() for section in sections}


def test_every_section_says_what_it_means_how_to_check_and_what_to_do() -> None:
    for section in RUNBOOK.split("\n## ")[1:]:
        assert re.findall(r"^\*\*(Means|Check|Do)\.\*\*", section, re.MULTILINE) == ["Means", "Check", "Do"], section


def test_every_alert_says_how_urgent_it_is() -> None:
    assert {rule["labels"]["severity"] for rule in ALERTS} == {"warning", "critical"}
