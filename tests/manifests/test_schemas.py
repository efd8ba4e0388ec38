"""Every overlay, and every component alone, is what Kubernetes and the operators take: strictly, nothing unknown."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.manifests.kustomize import COMPONENTS, OVERLAYS, overlay, with_components
from tests.manifests.schemas import KUBERNETES, mistakes


@pytest.mark.parametrize("kubernetes", KUBERNETES)
@pytest.mark.parametrize("name", OVERLAYS)
def test_every_overlay_is_valid(name: str, kubernetes: str) -> None:
    assert [text for resource in overlay(name) for text in mistakes(resource, kubernetes)] == []


@pytest.mark.parametrize("name", COMPONENTS)
def test_every_component_fits_the_base_by_itself(name: str, tmp_path: Path) -> None:
    resources = with_components(tmp_path, name)

    assert [text for resource in resources for text in mistakes(resource, KUBERNETES[-1])] == []


@pytest.mark.parametrize("kubernetes", KUBERNETES)
def test_a_field_that_does_not_exist_is_found_wherever_it_is(kubernetes: str) -> None:
    wrong = [
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "s"}, "spec": {"port": []}},
        {"apiVersion": "v1", "kind": "Servce", "metadata": {"name": "s"}},
        {"apiVersion": "keda.sh/v1alpha1", "kind": "ScaledObject", "metadata": {"name": "s"}, "spec": {"min": 1}},
        {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "Job", "metadata": {"name": "s"}},
    ]

    assert all(mistakes(resource, kubernetes) for resource in wrong)
