"""Containers as the kubelet starts them, but with their paths below a folder and their addresses on loopback."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.manifests.kustomize import Resource, of_kind

WORKLOADS = ("StatefulSet", "Deployment", "Job", "JobSet")


@dataclass(frozen=True)
class Pod:
    """A pod template; `owner` is e.g. StatefulSet/policy."""

    owner: str
    labels: Mapping[str, str]
    spec: Mapping[str, Any]

    @property
    def containers(self) -> list[Mapping[str, Any]]:
        """All of them, those that come first, first."""
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]


def pods(resources: Sequence[Resource]) -> Iterator[Pod]:
    """Every pod template of every workload."""
    for each in of_kind(resources, *WORKLOADS):
        owner = f"{each['kind']}/{each['metadata']['name']}"
        templates = {owner: each["spec"].get("template")}
        if each["kind"] == "JobSet":
            jobs = each["spec"]["replicatedJobs"]
            templates = {f"{owner}/{job['name']}": job["template"]["spec"]["template"] for job in jobs}
        for name, template in templates.items():
            yield Pod(name, template["metadata"]["labels"], template["spec"])


class Sandbox:
    """Folders in the place of volumes. ConfigMaps are written; Secrets and claims are the caller's to fill.

    `hosts`: what stands for an address that a server listens on or is called by, as {"0.0.0.0": "127.0.1.1"}.
    """

    def __init__(self, resources: Sequence[Resource], folder: Path, hosts: Mapping[str, str] | None = None) -> None:
        self._config_maps = {each["metadata"]["name"]: each["data"] for each in of_kind(resources, "ConfigMap")}
        self._folder = folder
        self._hosts = hosts or {}

    def secret(self, name: str) -> Path:
        """The folder of a Secret's files."""
        return self._made("secret", name)

    def claim(self, name: str) -> Path:
        """The folder of a PersistentVolumeClaim."""
        return self._made("claim", name)

    def arguments(self, pod: Pod, container: Mapping[str, Any]) -> list[str]:
        """Its command line, without the image's own entry point."""
        return [
            self._here(pod, container, text) for text in (*container.get("command", ()), *container.get("args", ()))
        ]

    def environment(self, pod: Pod, container: Mapping[str, Any]) -> dict[str, str]:
        """Its variables; one that Kubernetes makes up or a Secret has is left to the caller."""
        values = {each["name"]: each["value"] for each in container.get("env", ()) if "value" in each}
        return {name: self._here(pod, container, value) for name, value in values.items()}

    def mounts(self, pod: Pod, container: Mapping[str, Any]) -> dict[str, Path]:
        """What is where its volumes are mounted."""
        volumes = {each["name"]: each for each in pod.spec["volumes"]}
        return {
            each["mountPath"]: self._volume(pod, volumes[each["name"]]) / each.get("subPath", "")
            for each in container.get("volumeMounts", ())
        }

    def write_config_maps(self, pod: Pod, container: Mapping[str, Any]) -> None:
        """Put the files of its ConfigMaps where they are mounted."""
        volumes = {each["name"]: each for each in pod.spec["volumes"]}
        for mount in container.get("volumeMounts", ()):
            volume = volumes[mount["name"]]
            if "configMap" in volume:
                for name, text in self._config_maps[volume["configMap"]["name"]].items():
                    (self._volume(pod, volume) / name).write_text(self._here(pod, container, text))

    def _volume(self, pod: Pod, volume: Mapping[str, Any]) -> Path:
        if "secret" in volume:
            return self.secret(volume["secret"]["secretName"])
        if "persistentVolumeClaim" in volume:
            return self.claim(volume["persistentVolumeClaim"]["claimName"])
        return self._made(pod.owner.replace("/", "-"), volume["name"])

    def _made(self, kind: str, name: str) -> Path:
        folder = self._folder / kind / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _here(self, pod: Pod, container: Mapping[str, Any], text: str) -> str:
        for path, folder in sorted(self.mounts(pod, container).items(), reverse=True):
            text = re.sub(rf"(?<![\w/.]){re.escape(path)}(?![\w-])", str(folder), text)
        for host, address in self._hosts.items():
            text = re.sub(rf"(?<![\w.-]){re.escape(host)}(?=:\d|$|\s|\")", address, text)
        return text
