"""What the manifests give to a process is what it takes: no flag, variable, setting, path or port that isn't there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from policy_server.settings import PolicySettings
from reward_server.settings import RewardSettings
from rlhf.config import ProcessSettings, load_settings
from rlhf.security.settings import SecuredServerSettings
from tests.manifests.containers import Pod, Sandbox, pods
from tests.manifests.kustomize import COMPONENTS, OVERLAYS, Resource, of_kind, overlay, with_components
from trainer.settings import TrainerSettings

SETTINGS: dict[str, type[ProcessSettings]] = {
    "policy": PolicySettings,
    "reward": RewardSettings,
    "trainer": TrainerSettings,
}


@pytest.fixture(params=[*OVERLAYS, *(f"base with {name}" for name in COMPONENTS)])
def resources(request: pytest.FixtureRequest, tmp_path: Path) -> list[Resource]:
    component = request.param.removeprefix("base with ")
    return overlay(component) if component in OVERLAYS else with_components(tmp_path / "made", component)


def settings_of(
    pod: Pod, container: Any, resources: list[Resource], folder: Path, patch: pytest.MonkeyPatch
) -> ProcessSettings:
    """The settings that the container's process comes to; ends the test as the process would end."""
    sandbox = Sandbox(resources, folder)
    sandbox.write_config_maps(pod, container)
    for name in [name for name in os.environ if name.startswith("RLHF_")]:
        patch.delenv(name)
    for name, value in sandbox.environment(pod, container).items():
        patch.setenv(name, value)
    name = container["name"]
    return load_settings(SETTINGS[name], behind_module(sandbox.arguments(pod, container)), prog=name)


def behind_module(arguments: list[str]) -> list[str]:
    """The process's own arguments: without `python -m module`, which otherwise is the image's entry point."""
    return arguments[3:] if arguments[:2] == ["python", "-m"] else arguments


def test_settings_ports_and_paths_are_those_of_the_process(
    resources: list[Resource], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()
    for pod in pods(resources):
        for container in pod.containers:
            if container["name"] not in SETTINGS:
                continue
            seen.add(container["name"])
            with monkeypatch.context() as patch:
                settings = settings_of(pod, container, resources, tmp_path, patch)
            ports = {each["name"]: each["containerPort"] for each in container.get("ports", ())}
            if ports:
                assert ports.pop("metrics") == settings.metrics_port, pod.owner
                assert settings.metrics_host == "0.0.0.0", pod.owner
            if isinstance(settings, SecuredServerSettings):
                # Where there are certificates nobody is let in without one.
                guarded = settings.tls_client_ca is not None and settings.access_file is not None
                assert guarded is not settings.insecure, pod.owner
                assert guarded is bool(of_kind(resources, "Certificate")), pod.owner
                assert f"0.0.0.0:{ports.pop('grpc')}" == settings.listen, pod.owner
                health = ports.pop("health", None)
                assert settings.health_listen == (health and f"0.0.0.0:{health}"), pod.owner
            mounted = tuple(str(mount) for mount in Sandbox(resources, tmp_path).mounts(pod, container).values())
            paths = [str(value) for value in settings.model_dump().values() if str(value).startswith("/")]
            assert [path for path in paths if not path.startswith(mounted)] == [], pod.owner
    trains = bool(of_kind(resources, "Job", "JobSet"))
    assert seen == set(SETTINGS) - (set() if trains else {"trainer"})
