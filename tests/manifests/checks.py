"""The checks of rendered manifests: JSON schemas of several Kubernetes versions, and the policy of this project.

Each check returns a list of complaints, empty when all is well, so that a test can show that it finds a bad example.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import referencing
from referencing.jsonschema import DRAFT4

VERSIONS = ("1.32", "1.33", "1.34", "1.35", "1.36", "1.37")
OURS = Path(__file__).resolve().parent / "schemas"
THEIRS = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema"
# Groups of Kubernetes itself; everything else is a custom resource, whose schema does not depend on the version.
BUILT_IN = re.compile(r"^([a-z]+|[a-z.]+\.k8s\.io)$")
DIGEST = re.compile(r"@sha256:[0-9a-f]{64}$")
RESTRICTED_VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}
Manifest = dict[str, Any]


def name(manifest: Manifest) -> str:
    return f"{manifest.get('kind')}/{manifest.get('metadata', {}).get('name')}"


@cache
def _registry(folder: Path) -> referencing.Registry:
    @cache
    def retrieve(uri: str) -> referencing.Resource:
        return referencing.Resource(json.loads((folder / Path(uri).name).read_text()), DRAFT4)

    return referencing.Registry(retrieve=retrieve)


@cache
def _validator(api_version: str, kind: str, version: str) -> jsonschema.protocols.Validator | None:
    group, _, number = api_version.rpartition("/")
    if BUILT_IN.match(group) or not group:
        folder = THEIRS / f"v{version}.0-local-strict"
        short = group.split(".")[0]
        path = folder / f"{kind.lower()}-{short + '-' if short else ''}{number}.json"
    else:
        folder, path = OURS, OURS / f"{kind.lower()}-{group}-{number}.json"
    if not path.is_file():
        return None
    return jsonschema.Draft4Validator(json.loads(path.read_text()), registry=_registry(folder))


@cache
def _schema_complaints(text: str, version: str) -> tuple[str, ...]:
    manifest = json.loads(text)
    validator = _validator(manifest.get("apiVersion", ""), manifest.get("kind", ""), version)
    if validator is None:
        return (f"{name(manifest)}: Kubernetes {version} has no {manifest.get('apiVersion')} {manifest.get('kind')}",)
    return tuple(
        f"{name(manifest)} [{version}] {'.'.join(map(str, error.path))}: {error.message[:200]}"
        for error in validator.iter_errors(manifest)
    )


def schema(manifests: list[Manifest], version: str) -> list[str]:
    """Complaints of the schemas of one Kubernetes version, and of the custom resources."""
    found = []
    for manifest in manifests:
        found.extend(_schema_complaints(json.dumps(manifest, sort_keys=True), version))
    return found


def pods(manifest: Manifest) -> Iterator[Manifest]:
    """The pod specifications in a manifest."""
    spec = manifest.get("spec", {})
    kind = manifest.get("kind")
    if kind == "Pod":
        yield spec
    elif kind in ("Deployment", "StatefulSet", "DaemonSet", "Job", "ReplicaSet"):
        yield spec["template"]["spec"]
    elif kind == "CronJob":
        yield spec["jobTemplate"]["spec"]["template"]["spec"]
    elif kind == "InferenceService":
        yield spec["predictor"]
    elif kind == "RayJob":
        cluster = spec["rayClusterSpec"]
        for group in (cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])):
            yield group["template"]["spec"]


def containers(pod: Manifest) -> Iterator[Manifest]:
    yield from pod.get("initContainers", [])
    yield from pod["containers"]


def restricted(manifest: Manifest) -> list[str]:
    """What the Pod Security Standard `restricted` refuses; a writable root and a user without a number, too."""
    found = []
    for pod in pods(manifest):
        found += [f"{key} is set" for key in ("hostNetwork", "hostPID", "hostIPC") if pod.get(key)]
        for volume in pod.get("volumes", []):
            kinds = set(volume) - {"name"}
            found += [f"volume {volume['name']} is a {kind}" for kind in kinds - RESTRICTED_VOLUMES]
        if pod.get("automountServiceAccountToken") is not False:
            found.append("the service account's token is mounted")
        shared = pod.get("securityContext", {})
        for container in containers(pod):
            own, where = container.get("securityContext", {}), container["name"]
            merged = {**shared, **own}
            if merged.get("runAsNonRoot") is not True or not merged.get("runAsUser"):
                found.append(f"{where} may run as root, or its user is no number")
            if merged.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
                found.append(f"{where} has no seccomp profile")
            if own.get("allowPrivilegeEscalation") is not False or own.get("privileged"):
                found.append(f"{where} may gain privileges")
            if own.get("capabilities", {}).get("drop") != ["ALL"] or own["capabilities"].get("add"):
                found.append(f"{where} keeps capabilities")
            if own.get("readOnlyRootFilesystem") is not True:
                found.append(f"{where} can write to its root")
            if any("hostPort" in port for port in container.get("ports", [])):
                found.append(f"{where} takes a port of the host")
    return [f"{name(manifest)}: {one}" for one in found]


def limits(manifest: Manifest) -> list[str]:
    """Containers without requests and limits of CPU and memory."""
    return [
        f"{name(manifest)}: {container['name']} has no {kind[:-1]} of {resource}"
        for pod in pods(manifest)
        for container in containers(pod)
        for kind in ("requests", "limits")
        for resource in ("cpu", "memory")
        if resource not in container.get("resources", {}).get(kind, {})
    ]


def probes(manifest: Manifest) -> list[str]:
    """Servers without a startup, readiness or liveness probe. What ends by itself needs none."""
    if manifest["kind"] not in ("Deployment", "StatefulSet", "DaemonSet", "InferenceService"):
        return []
    return [
        f"{name(manifest)}: {container['name']} has no {probe}"
        for pod in pods(manifest)
        for container in pod["containers"]
        for probe in ("startupProbe", "readinessProbe", "livenessProbe")
        if probe not in container
    ]


def digests(manifest: Manifest) -> list[str]:
    """Images that a tag names."""
    return [
        f"{name(manifest)}: {container['image']} is not pinned by digest"
        for pod in pods(manifest)
        for container in containers(pod)
        if not DIGEST.search(container.get("image", ""))
    ]


SECRET_NAME = re.compile(r"(?i)(password|secret_?(access)?_?key|token|credential|api_?key)")
SECRET_VALUE = re.compile(r"://[^/\s:@]+:[^/\s@]+@")


def plain_secrets(manifest: Manifest) -> list[str]:
    """Secrets in the open: a Secret with data, a secret-like variable with a value, a password in a URL."""
    found = []
    if manifest["kind"] == "Secret" and (manifest.get("data") or manifest.get("stringData")):
        found.append("a Secret with its data")
    for pod in pods(manifest):
        for container in containers(pod):
            found += [
                f"{variable['name']} has a value in {container['name']}"
                for variable in container.get("env", [])
                if SECRET_NAME.search(variable["name"]) and variable.get("value")
            ]
    if manifest["kind"] == "ConfigMap":
        found += [f"{key} is in a ConfigMap" for key in manifest.get("data", {}) if SECRET_NAME.search(key)]
    if SECRET_VALUE.search(json.dumps(manifest)):
        found.append("a URL with a password")
    return [f"{name(manifest)}: {one}" for one in found]


POLICIES = (restricted, limits, probes, digests, plain_secrets)
