"""A Kubernetes cluster, through kubectl."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from typing import Any

import yaml

from tests.support.processes import wait_for


class Cluster:
    """One namespace of a cluster; `kubectl` is the command that reaches it."""

    def __init__(self, kubectl: Sequence[str], namespace: str) -> None:
        self._kubectl = tuple(kubectl)
        self.namespace = namespace

    def run(self, *arguments: str, stdin: str | None = None, within: float = 120) -> str:
        """What kubectl says; fails with what it complains of."""
        done = self._run(arguments, stdin, within)
        assert done.returncode == 0, f"kubectl {' '.join(arguments)}: {done.stderr}"
        return done.stdout

    def tries(self, *arguments: str) -> str | None:
        """What kubectl says, None when it fails: the pod is away, say."""
        done = self._run(arguments, None, 60)
        return done.stdout if done.returncode == 0 else None

    def apply(self, resources: Sequence[dict[str, Any]]) -> None:
        """As `kubectl apply` does."""
        self.run("apply", "-f", "-", stdin=yaml.safe_dump_all(resources))

    def versions(self, resources: Sequence[dict[str, Any]]) -> list[int]:
        """The generation of each that has one: it rises when its specification changes."""
        found = json.loads(self.run("get", "-f", "-", "-o", "json", stdin=yaml.safe_dump_all(resources)))
        return [each["metadata"].get("generation", 0) for each in found["items"]]

    def delete(self, resources: Sequence[dict[str, Any]]) -> None:
        """Delete them, whether or not they are there."""
        self.run("delete", "--ignore-not-found", "-f", "-", stdin=yaml.safe_dump_all(resources), within=180)

    def pods(self, component: str) -> list[dict[str, Any]]:
        """Of a component, those that have not ended and are not about to."""
        found = json.loads(self.run("get", "pods", "-l", f"app.kubernetes.io/component={component}", "-o", "json"))
        return [
            pod
            for pod in found["items"]
            if pod["status"]["phase"] in ("Pending", "Running") and "deletionTimestamp" not in pod["metadata"]
        ]

    def names(self, component: str) -> list[str]:
        """Of those pods."""
        return [pod["metadata"]["name"] for pod in self.pods(component)]

    def pod(self, component: str) -> str:
        """The name of the first of them, once there is one that runs."""
        running: list[str] = []

        def look() -> bool:
            running[:] = [pod["metadata"]["name"] for pod in self.pods(component) if is_running(pod)]
            return bool(running)

        wait_for(look, within=120, what=f"{component} pod", every=1)
        return running[0]

    def ready(self, component: str, count: int = 1, *, within: float = 180) -> None:
        """Until so many pods of the component are Ready, and no other is there."""

        def are_ready() -> bool:
            return [is_ready(pod) for pod in self.pods(component)] == [True] * count

        wait_for(are_ready, within=within, what=f"{count} {component} pods that are Ready", every=1)

    def everything(self) -> list[str]:
        """What is in the namespace, but for what every namespace has."""
        kinds = self.run("api-resources", "--verbs=list", "--namespaced", "--output=name").split()
        kinds = [kind for kind in kinds if not kind.startswith("events")]
        found = self.run("get", ",".join(kinds), "--output=name").split()
        return [name for name in found if name not in ("configmap/kube-root-ca.crt", "serviceaccount/default")]

    def evict(self, pod: str) -> None:
        """As `kubectl drain` does."""
        eviction = {
            "apiVersion": "policy/v1",
            "kind": "Eviction",
            "metadata": {"name": pod, "namespace": self.namespace},
        }
        path = f"/api/v1/namespaces/{self.namespace}/pods/{pod}/eviction"
        self.run("create", "--raw", path, "-f", "-", stdin=json.dumps(eviction))

    def kill(self, component: str) -> None:
        """SIGKILL to the component's process, within its pod, which has to share its process namespace."""
        self.run("exec", self.pod(component), "-c", component, "--", "python3", "-c", _KILL)

    def reads(self, command: str, image: str) -> str:
        """What a shell command says in a pod that has the claim `runs` at /runs, once no other pod has it."""
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "reader", "namespace": self.namespace},
            "spec": {
                "restartPolicy": "Never",
                "automountServiceAccountToken": False,
                "securityContext": {
                    "runAsNonRoot": True,
                    "runAsUser": 10001,
                    "seccompProfile": {"type": "RuntimeDefault"},
                },
                "containers": [
                    {
                        "name": "reader",
                        "image": image,
                        "command": ["sh", "-c", command],
                        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                        "volumeMounts": [{"name": "runs", "mountPath": "/runs", "subPath": self.namespace}],
                    }
                ],
                "volumes": [{"name": "runs", "persistentVolumeClaim": {"claimName": "runs"}}],
            },
        }
        self.apply([pod])
        self.run("wait", "--for=jsonpath={.status.phase}=Succeeded", "--timeout=110s", "pod/reader")
        said = self.run("logs", "reader")
        self.run("delete", "pod", "reader")
        return said

    def story(self) -> str:
        """What is there and what was said last, for a test that fails."""
        parts = ["get pods -o wide", "get events --sort-by=.lastTimestamp"]
        parts += [
            f"logs --prefix --ignore-errors --tail=25 --all-containers -l app.kubernetes.io/component={component}"
            for component in ("trainer", "policy", "reward")
        ]
        return "\n".join(f"# {part}\n{self.tries(*part.split()) or ''}"[-6000:] for part in parts)

    def _run(self, arguments: Sequence[str], stdin: str | None, within: float) -> subprocess.CompletedProcess[str]:
        command = [*self._kubectl, "--namespace", self.namespace, *arguments]
        return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=within)


# The server or trainer is the oldest Python there. It is not the first process, which its own namespace can't kill.
_KILL = """
import os, pathlib, signal
commands = pathlib.Path("/proc").glob("[0-9]*/cmdline")
os.kill(min(int(each.parent.name) for each in commands if b"python" in each.read_bytes()), signal.SIGKILL)
"""


def is_running(pod: dict[str, Any]) -> bool:
    """Whether its containers run."""
    return any("running" in each["state"] for each in pod["status"].get("containerStatuses", ()))


def is_ready(pod: dict[str, Any]) -> bool:
    """Whether it says that it is Ready."""
    return any(each["type"] == "Ready" and each["status"] == "True" for each in pod["status"].get("conditions", ()))
