"""What the resources of an overlay say of each other agrees, which no schema can see."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.manifests.containers import Pod, pods
from tests.manifests.kustomize import OVERLAYS, TOGETHER, Resource, of_kind, overlay, with_components
from tests.support.processes import ROOT

MADE_BY_HAND = {"postgres"}  # docs/kubernetes.md says how


@pytest.fixture(scope="module", params=[*OVERLAYS, "everything"])
def resources(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Resource]:
    if request.param != "everything":
        return overlay(request.param)
    return with_components(tmp_path_factory.mktemp("everything"), *TOGETHER, namespace="rlhf")


def names(resources: list[Resource], kind: str) -> set[str]:
    return {each["metadata"]["name"] for each in of_kind(resources, kind)}


def matches(selector: Any, pod: Pod) -> bool:
    return selector.get("matchLabels", {}).items() <= pod.labels.items()


def test_every_volume_and_variable_comes_from_something_that_is_made(resources: list[Resource]) -> None:
    secrets = {each["spec"]["secretName"] for each in of_kind(resources, "Certificate")} | MADE_BY_HAND
    for pod in pods(resources):
        for volume in pod.spec["volumes"]:
            if "configMap" in volume:
                assert volume["configMap"]["name"] in names(resources, "ConfigMap"), pod.owner
            if "secret" in volume:
                assert volume["secret"]["secretName"] in secrets, pod.owner
            if "persistentVolumeClaim" in volume:
                claim = volume["persistentVolumeClaim"]["claimName"]
                assert claim in names(resources, "PersistentVolumeClaim"), pod.owner
        for variable in (each for container in pod.containers for each in container.get("env", ())):
            if "secretKeyRef" in variable.get("valueFrom", {}):
                assert variable["valueFrom"]["secretKeyRef"]["name"] in secrets, pod.owner


def test_every_pod_keeps_to_the_restricted_standard_and_writes_nowhere_but_to_volumes(
    resources: list[Resource],
) -> None:
    for pod in pods(resources):
        whole = pod.spec["securityContext"]
        assert (whole["runAsNonRoot"], whole["seccompProfile"]["type"]) == (True, "RuntimeDefault"), pod.owner
        assert whole["runAsUser"] >= 10_000 or pod.owner == "StatefulSet/postgres", pod.owner
        assert pod.spec["automountServiceAccountToken"] is False, pod.owner
        assert not [volume for volume in pod.spec["volumes"] if "hostPath" in volume], pod.owner
        for container in pod.containers:
            own = container["securityContext"]
            assert own["allowPrivilegeEscalation"] is False, container["name"]
            assert own["readOnlyRootFilesystem"] is True, container["name"]
            assert own["capabilities"] == {"drop": ["ALL"]}, container["name"]
            assert {"requests", "limits"} <= container["resources"].keys(), container["name"]


def test_services_lead_to_ports_of_pods_that_exist(resources: list[Resource]) -> None:
    for service in of_kind(resources, "Service"):
        found = [pod for pod in pods(resources) if matches({"matchLabels": service["spec"]["selector"]}, pod)]
        open_ports = {
            port[key]
            for pod in found
            for container in pod.containers
            for port in container.get("ports", ())
            for key in ("name", "containerPort")
        }
        wanted = {port.get("targetPort", port["port"]) for port in service["spec"]["ports"]}
        assert wanted <= open_ports, service["metadata"]["name"]


def test_network_policies_choose_pods_that_exist_and_open_ports_that_they_have(resources: list[Resource]) -> None:
    opened = {
        port[key]
        for pod in pods(resources)
        for container in pod.containers
        for port in container.get("ports", ())
        for key in ("name", "containerPort")
    }
    for policy in of_kind(resources, "NetworkPolicy"):
        for rule in policy["spec"].get("ingress", ()):
            chosen = [pod for pod in pods(resources) if matches(policy["spec"]["podSelector"], pod)]
            if chosen:
                assert {port["port"] for port in rule.get("ports", ())} <= opened, policy["metadata"]["name"]


def test_scaling_has_one_owner_and_nothing_else_says_how_many(resources: list[Resource]) -> None:
    scaled = [each["spec"]["scaleTargetRef"] for each in of_kind(resources, "ScaledObject", "HorizontalPodAutoscaler")]
    targets = [(target["kind"], target["name"]) for target in scaled]
    assert len(set(targets)) == len(targets)
    for kind, name in targets:
        (target,) = [each for each in of_kind(resources, kind) if each["metadata"]["name"] == name]
        assert "replicas" not in target["spec"], name
    for each in of_kind(resources, "ScaledObject"):
        least = each["spec"]["minReplicaCount"]
        assert least >= 1 if each["spec"]["scaleTargetRef"]["name"] == "policy" else least >= 0


def test_scaling_asks_for_metrics_that_the_processes_have(resources: list[Resource]) -> None:
    declared = "".join((ROOT / package / "metrics.py").read_text() for package in ("trainer", "policy_server"))
    for each in of_kind(resources, "ScaledObject"):
        asked = set(re.findall(r"\brlhf_\w+", each["spec"]["triggers"][0]["metadata"]["query"]))
        assert asked
        assert [name for name in asked if f'"{name}"' not in declared] == []


def test_what_names_a_namespace_names_the_one_that_it_is_in(resources: list[Resource]) -> None:
    namespaces = {each["metadata"]["namespace"] for each in resources if each["kind"] in ("StatefulSet", "Deployment")}
    assert len(namespaces) == 1
    (namespace,) = namespaces
    queries = "".join(each["spec"]["triggers"][0]["metadata"]["query"] for each in of_kind(resources, "ScaledObject"))
    assert set(re.findall(r'namespace="([^"]+)"', queries)) <= {namespace}
    hosts = [name for each in of_kind(resources, "Certificate") for name in each["spec"].get("dnsNames", ())]
    assert {host.split(".")[1] for host in hosts if "." in host} <= {namespace}


def test_an_operator_names_the_image_of_all_containers_in_one_place(tmp_path: Path) -> None:
    mine = {"name": "rlhf/trainer", "newName": "registry.example/trainer", "newTag": "1"}

    made = with_components(tmp_path, *TOGETHER, images=[mine])

    used = {container["image"] for pod in pods(made) for container in pod.containers}
    assert "registry.example/trainer:1" in used
    assert not [image for image in used if image.startswith("rlhf/trainer")]
