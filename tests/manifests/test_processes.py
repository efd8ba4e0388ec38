"""The containers of production, started: their arguments, variables, files, ports, probes and paths, and their ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.manifests.containers import Sandbox, pods
from tests.manifests.kustomize import Resource, of_kind, overlay, with_components
from tests.manifests.test_settings import behind_module, settings_of
from tests.support.certificates import Authority
from tests.support.models import make_tiny_gpt2
from tests.support.processes import ProcessUnderTest, health_of, wait_for
from trainer.settings import TrainerSettings

# By the name of the container.
MODULES = {"policy": "policy_server", "reward": "reward_server", "trainer": "trainer"}
SERVICES = {"policy-peers": "policy", "policy": "policy", "reward": "reward", "trainer-leader-0-0.trainer": "leader"}
COMMIT = "0" * 40
# What makes a step of it small.
SMALL = {
    "RLHF_TRAINER_BATCH_SIZE": "4",
    "RLHF_TRAINER_MINI_BATCH_SIZE": "2",
    "RLHF_TRAINER_MAX_NEW_TOKENS": "8",
    "RLHF_TRAINER_EVAL_PROMPTS": "0",
}
# Servers are called by their addresses here, and by their names there.
NAMES = {"RLHF_TRAINER_POLICY_TLS_NAME": "policy-peers", "RLHF_TRAINER_REWARD_TLS_NAME": "reward"}


class Started:
    """Pods, one of each workload, by its name; of a JobSet one of each replicated job."""

    def __init__(self, resources: list[Resource], folder: Path) -> None:
        self.resources = resources
        self.folder = folder
        self.pods = {pod.owner.rpartition("/")[2]: pod for pod in pods(resources)}
        # Every pod has an address of its own, which no other test has, so the ports can be those of the manifests.
        network = f"127.{1 + os.getpid() % 250}.{os.getpid() // 250 % 250}"
        self.addresses = {name: f"{network}.{number}" for number, name in enumerate(self.pods, 1)}
        self.processes: dict[str, ProcessUnderTest] = {}

    def sandbox(self, name: str) -> Sandbox:
        """What the pod sees."""
        called = {service: self.addresses[pod] for service, pod in SERVICES.items() if pod in self.pods}
        return Sandbox(self.resources, self.folder, {"0.0.0.0": self.addresses[name], **called})

    def container(self, name: str) -> Any:
        """The one container of the pod that stays."""
        (container,) = self.pods[name].spec["containers"]
        return container

    def start(self, name: str, **more: str) -> ProcessUnderTest:
        """Run the pod's init containers to their end, then start its process."""
        pod, sandbox = self.pods[name], self.sandbox(name)
        for first in pod.spec.get("initContainers", ()):
            sandbox.write_config_maps(pod, first)
            program, *arguments = sandbox.arguments(pod, first)
            command = [sys.executable if program == "python" else program, *arguments]
            subprocess.run(command, env={**os.environ, **sandbox.environment(pod, first)}, check=True, timeout=60)
        container = self.container(name)
        sandbox.write_config_maps(pod, container)
        own = self.folder / "processes" / name
        own.mkdir(parents=True)
        environment = {**sandbox.environment(pod, container), **more}
        self.processes[name] = ProcessUnderTest(
            MODULES[container["name"]], behind_module(sandbox.arguments(pod, container)), own, env=environment
        )
        return self.processes[name]

    def answers(self, name: str, probe: str) -> bool:
        """What the kubelet learns by the startup, liveness or readiness probe."""
        asked = self.container(name)[f"{probe}Probe"]
        ports = {port["name"]: port["containerPort"] for port in self.container(name)["ports"]}
        code = self.processes[name].poll()
        assert code is None, f"{name} ended with {code}:\n{self.processes[name].log_text()[-4000:]}"
        if "grpc" in asked:
            address = f"{self.addresses[name]}:{asked['grpc']['port']}"
            return health_of(address, asked["grpc"].get("service", "")) == "SERVING"
        port = asked["httpGet"]["port"]
        try:
            url = f"http://{self.addresses[name]}:{ports.get(port, port)}{asked['httpGet']['path']}"
            with urllib.request.urlopen(url, timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def wait(self, name: str, *probes: str) -> None:
        """Until all of these probes succeed."""
        for probe in probes:
            wait_for(lambda: self.answers(name, probe), within=90, what=f"{probe} of {name}")  # noqa: B023


@pytest.fixture
def start_pods(tmp_path: Path) -> Iterator[Callable[[list[Resource]], Started]]:
    made: list[Started] = []

    def start(resources: list[Resource]) -> Started:
        made.append(Started(resources, tmp_path))
        return made[-1]

    try:
        yield start
    finally:
        for process in (each for started in made for each in started.processes.values()):
            if process.poll() is None:
                process.kill()


def issue_certificates(started: Started) -> None:
    """Do cert-manager's work: a Secret with tls.crt, tls.key and ca.crt for each Certificate that is no authority."""
    authority = Authority(started.folder / "authority")
    for each in of_kind(started.resources, "Certificate"):
        if not each["spec"].get("isCA"):
            secret = started.sandbox("policy").secret(each["spec"]["secretName"])
            cert, key = authority.issue(*each["spec"]["dnsNames"], into=secret)
            cert.rename(secret / "tls.crt")
            key.rename(secret / "tls.key")
            (secret / "ca.crt").write_bytes(authority.pem)


def write_inputs(started: Started, settings: TrainerSettings) -> None:
    """The model that the settings name, in its folder or in the hub's cache, and prompts where they are to be."""
    if Path(settings.model).is_absolute():
        make_tiny_gpt2(Path(settings.model), context=8192)
    else:
        cache = started.sandbox("policy").claim("models") / f"models--{settings.model.replace('/', '--')}"
        make_tiny_gpt2(cache / "snapshots" / COMMIT, context=8192)
        (cache / "refs").mkdir()
        (cache / "refs" / "main").write_text(COMMIT)
    rows = ({"prompt": f"The film {row} was"} for row in range(60))
    Path(settings.data).write_text("".join(json.dumps(row) + "\n" for row in rows))


def trainer_settings(started: Started, name: str, monkeypatch: pytest.MonkeyPatch) -> TrainerSettings:
    """What the trainer's container comes to, with paths of the sandbox."""
    with monkeypatch.context() as patch:
        settings = settings_of(started.pods[name], started.container(name), started.resources, started.folder, patch)
    assert isinstance(settings, TrainerSettings)
    return settings


def wait_for_a_step(settings: TrainerSettings) -> None:
    steps = settings.run_dir / "metrics.jsonl"
    wait_for(lambda: steps.exists() and '"kind": "step"' in steps.read_text(), within=240, what="step")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_production_starts_trains_and_stops_as_its_manifests_say(
    start_pods: Callable[[list[Resource]], Started], monkeypatch: pytest.MonkeyPatch
) -> None:
    production = start_pods(overlay("production"))
    settings = trainer_settings(production, "trainer", monkeypatch)
    issue_certificates(production)
    write_inputs(production, settings)

    production.start("policy")
    production.start("reward")
    production.wait("policy", "startup", "liveness")
    production.wait("reward", "startup", "liveness", "readiness")
    assert not production.answers("policy", "readiness"), "no weights have been published"
    trainer = production.start("trainer", **SMALL, **NAMES)
    production.wait("trainer", "liveness")
    production.wait("policy", "readiness")
    wait_for_a_step(settings)

    assert trainer.terminate() == 143, trainer.log_text()[-4000:]
    assert list((settings.run_dir / "checkpoints").iterdir())
    for name in ("policy", "reward"):
        assert production.processes[name].terminate() == 0, production.processes[name].log_text()[-4000:]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_ranks_of_a_jobset_train_together_and_end_with_the_trainers_own_code(
    start_pods: Callable[[list[Resource]], Started], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    several = start_pods(with_components(tmp_path / "made", "model-cache", "multi-node"))
    settings = trainer_settings(several, "leader", monkeypatch)
    write_inputs(several, settings)
    two = {**SMALL, "WORLD_SIZE": "2", "RLHF_TRAINER_PROCESSES": "2"}

    several.start("policy")
    several.start("reward")
    ranks = [several.start(name, **two, RANK=str(rank)) for rank, name in enumerate(("leader", "followers"))]
    wait_for_a_step(settings)
    assert several.answers("leader", "liveness")
    ranks[0].signal(signal.SIGTERM)

    assert [rank.wait_exit() for rank in ranks] == [143, 143], ranks[1].log_text()[-4000:]
