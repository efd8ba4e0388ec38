"""The demo's overlay on a real cluster: a run to its end, then one that loses whatever can be lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.integration.training import assert_drawn_once
from tests.k8s.cluster import Cluster
from tests.k8s.overlay import Overlays
from tests.support.processes import wait_for

pytestmark = [pytest.mark.k8s, pytest.mark.timeout(1200)]

RUN = "/runs/film-reviews"
FOREVER = 10_000


class Run:
    """The demo's run in a namespace, by its manifests."""

    def __init__(self, cluster: Cluster, overlays: Overlays) -> None:
        self.cluster = cluster
        self.overlays = overlays

    def apply(self, steps: int) -> list[int]:
        """With so many steps, and a Job that is there must have as many; the generations of what is there then."""
        resources = self.overlays.small("laptop", steps=steps)
        self.cluster.apply(resources)
        return self.cluster.versions(resources)

    def finished(self) -> None:
        """The Job is complete."""
        try:
            self.cluster.run("wait", "--for=condition=Complete", "--timeout=240s", "job/trainer", within=260)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.cluster.story()}") from None

    def steps(self) -> int:
        """Steps that are recorded; 0 while no trainer runs."""
        return len([line for line in self._lines("metrics.jsonl") if line["kind"] == "step"])

    def goes_on(self) -> int:
        """Until another step is made by a trainer that runs; how many there are."""
        before = wait_for(self.steps, within=180, what="steps of a trainer", every=1)
        try:
            return wait_for(lambda: self._above(before), within=180, what=f"step after {before}", every=1)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.cluster.story()}") from None

    def read(self, command: str) -> str:
        """What a shell command says of the run's `{folder}`, while no trainer runs."""
        return self.cluster.reads(command.format(folder=RUN), self.overlays.image("reward-server"))

    def _above(self, before: int) -> int:
        steps = self.steps()
        return steps if steps > before else 0

    def _lines(self, file: str) -> list[dict[str, Any]]:
        names = self.cluster.names("trainer") or [""]
        text = self.cluster.tries("exec", names[0], "-c", "trainer", "--", "cat", f"{RUN}/{file}") or ""
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


@pytest.fixture
def run(cluster: Cluster, images: list[dict[str, str]], on_this_machine: bool, tmp_path: Path) -> Run:
    return Run(cluster, Overlays(tmp_path, cluster.namespace, images, on_this_machine=on_this_machine))


def test_a_run_ends_under_restricted_pod_security_is_served_and_leaves_nothing(run: Run) -> None:
    cluster = run.cluster
    applied = run.apply(steps=2)
    run.finished()
    cluster.ready("policy")
    cluster.ready("reward")
    assert run.apply(steps=2) == applied

    cluster.apply(run.overlays.small("laptop-serve"))
    cluster.run("rollout", "status", "statefulset/policy", "--timeout=180s", within=200)
    ask = "python3 -m policy_server.client generate --target 127.0.0.1:50051 --max-new-tokens 8"
    assert cluster.run("exec", "policy-0", "-c", "policy", "--", *ask.split(), "The film is").strip()

    cluster.run("delete", "statefulset", "policy")  # which has the volume
    run.read("rm -rf /runs/*")
    cluster.delete(run.overlays.small("laptop"))
    wait_for(lambda: cluster.everything() == [], within=120, what="empty namespace", every=1)
    assert cluster.namespace not in cluster.run("get", "persistentvolumes", "--output=name")


def test_a_run_that_loses_each_of_its_pods_accounts_for_every_prompt_once(run: Run) -> None:
    cluster = run.cluster
    run.apply(steps=FOREVER)
    run.goes_on()

    cluster.run("delete", "pod", cluster.pod("policy"))
    run.goes_on()
    evicted = cluster.pod("trainer")
    cluster.evict(evicted)
    wait_for(lambda: evicted not in cluster.names("trainer"), within=120, what="end of the trainer", every=1)
    run.goes_on()
    cluster.run("rollout", "restart", "deployment/reward")
    cluster.run("rollout", "status", "deployment/reward", "--timeout=180s", within=200)
    run.goes_on()
    for component in ("policy", "reward", "trainer"):
        cluster.kill(component)
        run.goes_on()
        cluster.ready(component)
    cluster.run("scale", "statefulset/policy", "--replicas=2")
    cluster.ready("policy", 2)
    run.goes_on()
    cluster.run("scale", "statefulset/policy", "--replicas=1")
    cluster.ready("policy", 1)
    run.goes_on()

    cluster.run("delete", "job", "trainer")
    steps = run.read("cat {folder}/metrics.jsonl").count('"kind": "step"') + 2
    run.apply(steps)
    run.finished()
    lines = [json.loads(line) for line in run.read("cat {folder}/accounting.jsonl && rm -rf /runs/*").splitlines()]
    assert_drawn_once(lines)
    assert len(lines) == 16 * steps
    assert {line["outcome"] for line in lines} == {"trained"}


def test_settings_that_are_wrong_fail_the_job_at_once(run: Run) -> None:
    run.apply(steps=0)

    run.cluster.run("wait", "--for=condition=Failed", "--timeout=110s", "job/trainer")
    status = json.loads(run.cluster.run("get", "job/trainer", "--output=json"))["status"]
    assert status["failed"] == 1
    assert {each.get("reason") for each in status["conditions"]} == {"PodFailurePolicy"}
