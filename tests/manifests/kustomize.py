"""What kustomize makes of the folders of k8s/, alone or put together as an operator would."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.support.debian import required
from tests.support.processes import ROOT

K8S = ROOT / "k8s"
OVERLAYS = sorted(folder.parent.name for folder in (K8S / "overlays").glob("*/kustomization.yaml"))
# The one that takes the Job away comes last.
COMPONENTS = sorted(
    (folder.parent.name for folder in (K8S / "components").glob("*/kustomization.yaml")),
    key=lambda name: (name == "multi-node", name),
)
TOGETHER = [name for name in COMPONENTS if name != "serve"]
"""Components of one deployment: `serve` takes its trainer away."""

Resource = dict[str, Any]


def overlay(name: str) -> list[Resource]:
    """The resources of k8s/overlays/NAME."""
    return rendered(K8S / "overlays" / name)


@functools.cache
def _text(folder: Path) -> str:
    # kubectl has kustomize inside; `go install sigs.k8s.io/kustomize/kustomize/v5@…` brings it alone.
    kubectl, alone = shutil.which("kubectl"), shutil.which("kustomize")
    command = [kubectl, "kustomize"] if kubectl else [required(alone, "kubernetes-client"), "build"]
    done = subprocess.run([*command, folder], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rendered(folder: Path) -> list[Resource]:
    """The resources that the kustomization in `folder` makes; fails with what kustomize says."""
    return list(yaml.safe_load_all(_text(folder)))


def with_components(folder: Path, *components: str, **more: object) -> list[Resource]:
    """The base with these of k8s/components, by a kustomization in `folder` that has `more` fields beside."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {
        "resources": [_way(folder, K8S / "base")],
        "components": [_way(folder, K8S / "components" / name) for name in components],
        **more,
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(made))
    return rendered(folder)


def _way(start: Path, to: Path) -> str:
    return os.path.relpath(to, start)


def of_kind(resources: Sequence[Resource], *kinds: str) -> list[Resource]:
    """Those of these kinds."""
    return [each for each in resources if each["kind"] in kinds]


def main(folder: Path) -> None:
    """Write what every overlay makes into `folder`, and the base with every component, for tools that read files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in OVERLAYS:
        (folder / f"{name}.yaml").write_text(_text(K8S / "overlays" / name))
    with tempfile.TemporaryDirectory() as made:
        everything = with_components(Path(made), *TOGETHER, namespace="rlhf")
    (folder / "everything.yaml").write_text(yaml.safe_dump_all(everything))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
