"""Every query of every dashboard finds data in a real Prometheus that scraped a real run, and no alert cried wolf."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.integration.training import World, assert_finished, metric
from tests.support.processes import ROOT, wait_for
from tests.support.prometheus import Prometheus, announce, prometheus

MONITORING = ROOT / "k8s" / "monitoring"
RUN = "watched"
# Enough that every rate rises between two scrapes, a second apart, on a quick machine too.
STEPS = 15
# A fifth of the rows is ABSTAINED; the others have a component.
PARTLY = """
from reward_server import Reward
def reward(prompts, completions, **columns):
    scores = [len(set(text)) / 32 for text in completions]
    return [
        None if int(prompt.split()[2]) % 5 == 1 else Reward(score, components={"letters": score})
        for prompt, score in zip(prompts, scores)
    ]
"""


@dataclass(frozen=True)
class Watched:
    """Prometheus, and from when to when it watched (Unix seconds)."""

    prometheus: Prometheus
    start: float
    end: float


@pytest.fixture(scope="session")
def watched(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """A finished run, whose rewards came through a remote reward from the server that gives them."""
    folder = tmp_path_factory.mktemp("watched")
    files = {f"rlhf-{job}": folder / f"{job}.json" for job in ("policy", "reward", "trainer")}
    giving = world.reward_server(PARTLY, name="partly")
    giving.wait_serving("rlhf.reward.v1.RewardService")
    options = json.dumps({"target": giving.address})
    asking = world.start("reward_server", "--reward", "remote", "--reward-options", options)
    with prometheus(folder / "prometheus", files, rules=MONITORING / "rules.yaml") as server:
        start = time.time()
        announce(files["rlhf-policy"], world.policy.metrics_url)
        announce(files["rlhf-reward"], giving.metrics_url, asking.metrics_url)
        wait_for(lambda: len(server.query("up == 1")) == 3, within=30, what="scrape of the servers")
        trainer = world.trainer(RUN, "--metrics-linger", "60", reward=asking, steps=STEPS)
        announce(files["rlhf-trainer"], trainer.metrics_url)
        wait_for(lambda: server.query("rlhf_trainer_step >= 1"), within=120, what="step that Prometheus saw")
        stream = [
            sys.executable,
            "-m",
            "policy_server.client",
            "generate",
            "The film",
            "--target",
            world.policy.address,
        ]
        subprocess.run(stream, check=True, capture_output=True, timeout=60)
        first_messages = "rlhf_policy_first_message_seconds_count"
        streams = metric(world.policy, first_messages)
        wait_for(lambda: server.query(f"{first_messages} >= {streams}"), within=30, what="scrape after the stream")
        assert_finished(trainer)
        yield Watched(server, start, time.time())


@pytest.mark.parametrize("file", sorted((MONITORING / "dashboards").glob("*.json")), ids=lambda file: file.stem)
def test_every_panels_query_finds_data(watched: Watched, file: Path) -> None:
    dashboard = json.loads(file.read_text())
    values = chosen(watched.prometheus, dashboard["templating"]["list"])
    assert RUN in values["run"]

    empty = [
        f"{panel['title']}: {expression}"
        for panel in dashboard["panels"]
        for target in panel.get("targets", ())
        for expression in [substituted(target["expr"], {**values, "__rate_interval": "4s"})]
        if not has_data(watched, expression)
    ]

    assert not empty


def test_prometheus_saw_that_the_run_was_finished_and_no_alert_fired(watched: Watched) -> None:
    def seen(expression: str) -> list[dict[str, Any]]:
        # Of when the run ended, which may be a while ago.
        return watched.prometheus.query(expression, at=watched.end)

    def largest(expression: str) -> float:
        return max(float(series["value"][1]) for series in seen(expression))

    assert largest("last_over_time(rlhf_trainer_finished[5m])") == 1
    assert largest("last_over_time(rlhf:policy_weights_version:by_run[5m])") == STEPS
    assert not [series["metric"] for series in seen('last_over_time(ALERTS{alertstate="firing"}[5m])')]


def chosen(prometheus: Prometheus, variables: list[dict[str, Any]]) -> dict[str, str]:
    """What Grafana puts in for variables: all of those of which several may be chosen, else this test's run."""
    values: dict[str, str] = {}
    for variable in variables:
        if variable["type"] != "query":
            continue
        match = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
        assert match
        found = prometheus.label_values(substituted(match[1], values), match[2])
        assert found, f"no choice for ${variable['name']}"
        values[variable["name"]] = f"({'|'.join(found)})" if variable["multi"] else RUN
        assert variable["multi"] or RUN in found
    return values


def substituted(text: str, values: dict[str, str]) -> str:
    return re.sub(r"\$(\w+)", lambda name: values[name[1]], text)


def has_data(watched: Watched, expression: str) -> bool:
    series = watched.prometheus.query_range(expression, start=watched.start, end=watched.end, step=1)
    return any(not math.isnan(float(value)) for each in series for _, value in each["values"])
