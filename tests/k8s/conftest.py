"""The cluster that the tests run on: that of KUBECONFIG, or one that is started here.

KUBECONFIG: the images are those of IMAGES, a registry's folder ("registry.example/rlhf"), with the tag of IMAGES_TAG.

Else ONE_NODE is a program that makes a cluster of this machine: `up`, `down`, `image NAME TARGET CONTEXT`, which builds
an image where `up` finds it, and `state/k` in the folder CLUSTER_HOME, which is kubectl there. Only the image of the
reward server is built, in half a minute; the two with torch are gigabytes, so their processes run in it by this
machine's environment, which their pods mount, and so do a small model and prompts in the place of the demo's image.
"""

from __future__ import annotations

import os
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.k8s.cluster import Cluster
from tests.k8s.overlay import make_material
from tests.support.processes import ROOT


@pytest.fixture(scope="session")
def on_this_machine() -> bool:
    if os.environ.get("KUBECONFIG"):
        return False
    if not os.environ.get("ONE_NODE"):
        pytest.fail("neither KUBECONFIG nor ONE_NODE says what cluster to test on: see tests/k8s/conftest.py")
    return True


@pytest.fixture(scope="session")
def kubectl(on_this_machine: bool) -> Iterator[list[str]]:
    if not on_this_machine:
        yield ["kubectl"]
        return
    one_node = os.environ["ONE_NODE"]
    subprocess.run([one_node, "image", "localhost/rlhf/reward-server:test", "reward-server", ROOT], check=True)
    make_material()
    subprocess.run([one_node, "up"], check=True)
    try:
        yield [str(Path(os.environ["CLUSTER_HOME"]) / "state" / "k")]
    finally:
        subprocess.run([one_node, "down"], check=True)


@pytest.fixture
def cluster(kubectl: list[str]) -> Iterator[Cluster]:
    """A new namespace that enforces the restricted Pod Security Standard."""
    made = Cluster(kubectl, f"rlhf-{uuid.uuid4().hex[:6]}")
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    name: dict[str, Any] = {"name": made.namespace, "labels": labels}
    made.apply([{"apiVersion": "v1", "kind": "Namespace", "metadata": name}])
    try:
        yield made
    finally:
        made.run("delete", "namespace", made.namespace, within=300)
        for volume in ("runs", "machine"):
            made.run("delete", "--ignore-not-found", "persistentvolume", f"{made.namespace}-{volume}")


@pytest.fixture
def images(on_this_machine: bool) -> list[dict[str, str]]:
    """What kustomize is to put in the place of our images' names."""
    names = ("policy-server", "reward-server", "trainer", "demo")
    if on_this_machine:
        return [{"name": f"rlhf/{name}", "newName": "localhost/rlhf/reward-server", "newTag": "test"} for name in names]
    registry, tag = os.environ["IMAGES"], os.environ.get("IMAGES_TAG", "latest")
    return [{"name": f"rlhf/{name}", "newName": f"{registry}/{name}", "newTag": tag} for name in names]
