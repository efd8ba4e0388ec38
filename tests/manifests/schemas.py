"""Strict validation: a resource may hold what its schema names, and nothing else.

Kubernetes' own schemas come with kubernetes-validate. Those of the operators' resources are made of the operators'
CustomResourceDefinitions, which Go's module proxy has at pinned versions.
"""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

from tests.manifests.kustomize import Resource
from tests.support.debian import required

KUBERNETES = ("1.34", "1.37")

# By module: where its definitions are, and which of them are used here.
_DEFINITIONS = {
    "github.com/cert-manager/cert-manager@v1.21.2": (
        "deploy/crds/cert-manager.io_{}.yaml",
        ("certificates", "issuers"),
    ),
    "github.com/kedacore/keda/v2@v2.21.0": ("config/crd/bases/keda.sh_{}.yaml", ("scaledobjects",)),
    "github.com/prometheus-operator/prometheus-operator@v0.85.0": (
        "example/prometheus-operator-crd/monitoring.coreos.com_{}.yaml",
        ("podmonitors", "prometheusrules"),
    ),
    "sigs.k8s.io/jobset@v0.10.1": ("config/components/crd/bases/jobset.x-k8s.io_{}.yaml", ("jobsets",)),
}
_OPERATORS = ("cert-manager.io", "keda.sh", "monitoring.coreos.com", "jobset.x-k8s.io")
# Of a schema's keywords, those that say something of the value itself; the structure is walked.
_KEPT = {
    *("enum", "pattern", "required", "minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems"),
    *("minProperties", "maxProperties", "allOf", "anyOf", "oneOf", "not"),
}


def mistakes(resource: Resource, kubernetes: str) -> list[str]:
    """What is wrong with a resource by the schema that this version of Kubernetes, or its operator, has for it."""
    name = f"{resource['kind']} {resource['metadata']['name']}"
    if resource["apiVersion"].partition("/")[0] in _OPERATORS:
        schema = _custom_schemas().get((resource["apiVersion"], resource["kind"]))
        if schema is None:
            return [f"{name}: {resource['apiVersion']} has no such kind"]
        errors = jsonschema.Draft202012Validator(schema).iter_errors(resource)
        return [f"{name}: {error.json_path}: {error.message}" for error in errors]
    try:
        kubernetes_validate.validate(resource, kubernetes, strict=True)
    except kubernetes_validate.SchemaNotFoundError as error:
        return [f"{name}: {error.message}"]
    except kubernetes_validate.ValidationError as error:
        return [f"{name}: {error.json_path}: {error.message}"]
    return []


@functools.cache
def _custom_schemas() -> Mapping[tuple[str, str], Any]:
    """By (apiVersion, kind)."""
    return {
        (f"{spec['group']}/{version['name']}", spec["names"]["kind"]): _strict(version["schema"]["openAPIV3Schema"])
        for module, (path, names) in _DEFINITIONS.items()
        for folder in [source_of(module)]
        for name in names
        for spec in [yaml.load((folder / path.format(name)).read_text(), yaml.CSafeLoader)["spec"]]
        for version in spec["versions"]
    }


def source_of(module: str) -> Path:
    """Where Go keeps the module, downloaded if it is not there yet."""
    go = required(shutil.which("go"), "golang")
    # Outside any module, so that no go.mod matters.
    done = subprocess.run(
        [go, "mod", "download", "-json", module], cwd="/", capture_output=True, text=True, timeout=240
    )
    answer = json.loads(done.stdout or "{}")
    assert done.returncode == 0, f"{module}: {answer.get('Error') or done.stderr}"
    return Path(answer["Dir"])


def _strict(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON schema of an OpenAPI one, which refuses what it does not name."""
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    made = {key: schema[key] for key in _KEPT & schema.keys()}
    if "type" in schema:
        made["type"] = [schema["type"], "null"] if schema.get("nullable") else schema["type"]
    if "items" in schema:
        made["items"] = _strict(schema["items"])
    if isinstance(values := schema.get("additionalProperties"), dict):
        made["additionalProperties"] = _strict(values)
    if "properties" in schema:
        made["properties"] = {name: _strict(each) for name, each in schema["properties"].items()}
        if not {"additionalProperties", "x-kubernetes-preserve-unknown-fields"} & schema.keys():
            made["additionalProperties"] = False
    return made
