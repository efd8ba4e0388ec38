"""An overlay of k8s/ as a test applies it: in a namespace of its own, small, and on this machine by its environment."""

from __future__ import annotations

import json
import os
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.manifests.containers import WORKLOADS
from tests.manifests.kustomize import K8S, Resource, of_kind, rendered
from tests.support.models import make_tiny_gpt2
from tests.support.processes import ROOT

MATERIAL = ROOT / "build" / "k8s" / "demo"
MODULES = {"policy": "policy_server", "trainer": "trainer"}
SMALL = {
    "OMP_NUM_THREADS": "1",
    "RLHF_TRAINER_BATCH_SIZE": "16",
    "RLHF_TRAINER_MINI_BATCH_SIZE": "8",
    "RLHF_TRAINER_EVAL_PROMPTS": "8",
    "RLHF_TRAINER_EVAL_EVERY": "0",
    "RLHF_TRAINER_SAVE_EVERY": "1",
}


def make_material() -> None:
    """What the demo's image has at /demo, but a model of random weights."""
    model = make_tiny_gpt2(MATERIAL / "model")
    for file, count in (("prompts.jsonl", 400), ("held-out-prompts.jsonl", 40)):
        rows = ({"prompt": f"The {file[:4]} film {row} was"} for row in range(count))
        (MATERIAL / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for path in model.iterdir():
        path.chmod(0o644)  # safetensors makes files for their owner alone


class Overlays:
    """Renders overlays for one namespace, into `folder`."""

    def __init__(self, folder: Path, namespace: str, images: list[dict[str, str]], *, on_this_machine: bool) -> None:
        self._folder = folder
        self._namespace = namespace
        self._images = images
        self._on_this_machine = on_this_machine

    def small(self, name: str, *, steps: int = 1) -> list[Resource]:
        """The resources of k8s/overlays/NAME, with a run of so many small steps."""
        folder = self._folder / name
        folder.mkdir(exist_ok=True)
        made = {
            "namespace": self._namespace,
            "resources": [os.path.relpath(K8S / "overlays" / name, folder)],
            "images": self._images,
        }
        (folder / "kustomization.yaml").write_text(yaml.safe_dump(made))
        # What is of the cluster or of its node and not of the namespace gets its name too.
        text = yaml.safe_dump_all(rendered(folder)).replace("rlhf-laptop-runs", f"{self._namespace}-runs")
        text = text.replace("subPath: rlhf", f"subPath: {self._namespace}")
        resources: list[Resource] = list(yaml.safe_load_all(text))
        for each in of_kind(resources, *WORKLOADS):
            self._shrink(each["spec"]["template"]["spec"], steps)
            if self._on_this_machine:
                self._borrow(each["spec"]["template"]["spec"])
        return [*resources, *(self._machine() if self._on_this_machine else [])]

    def image(self, name: str) -> str:
        """What stands for the image rlhf/NAME."""
        (made,) = [each for each in self._images if each["name"] == f"rlhf/{name}"]
        return f"{made['newName']}:{made['newTag']}"

    def _shrink(self, pod: dict[str, Any], steps: int) -> None:
        # So that a process can be killed from within: the first one of a namespace can't.
        pod["shareProcessNamespace"] = True
        pod["containers"][0]["env"] += _variables({**SMALL, "RLHF_TRAINER_STEPS": str(steps)})

    def _borrow(self, pod: dict[str, Any]) -> None:
        """Run what needs torch by this machine's environment, and bring the model from here."""
        for container in pod.get("initContainers", ()):
            container["volumeMounts"].append(_mounted(MATERIAL, at="/demo"))
        container = pod["containers"][0]
        if container["name"] in MODULES:
            # Not at its own place, which perhaps only its owner may reach.
            container["command"] = ["/opt/python/bin/python3", "-m", MODULES[container["name"]]]
            container["workingDir"] = str(ROOT)
            environment = {
                "PATH": "/opt/python/bin:/bin",
                "LD_LIBRARY_PATH": "/opt/python/lib",
                "PYTHONPATH": f"{ROOT}:{sysconfig.get_path('purelib')}",
            }
            container["env"] += _variables(environment)
            container["volumeMounts"] += [_mounted(ROOT), _mounted(Path(sys.base_prefix), at="/opt/python")]
            pod["volumes"].append({"name": "machine", "persistentVolumeClaim": {"claimName": "machine"}})

    def _machine(self) -> list[Resource]:
        """This machine's disk as a volume: the restricted standard lets no pod mount a host's path itself."""
        name = f"{self._namespace}-machine"
        common = {"accessModes": ["ReadOnlyMany"]}
        size = {"storage": "1Gi"}
        return [
            {
                "apiVersion": "v1",
                "kind": "PersistentVolume",
                "metadata": {"name": name},
                "spec": {**common, "capacity": size, "hostPath": {"path": "/", "type": "Directory"}},
            },
            {
                "apiVersion": "v1",
                "kind": "PersistentVolumeClaim",
                "metadata": {"name": "machine", "namespace": self._namespace},
                "spec": {**common, "storageClassName": "", "volumeName": name, "resources": {"requests": size}},
            },
        ]


def _mounted(folder: Path, at: str = "") -> dict[str, Any]:
    return {"name": "machine", "mountPath": at or str(folder), "subPath": str(folder).lstrip("/"), "readOnly": True}


def _variables(values: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"name": name, "value": value} for name, value in values.items()]
