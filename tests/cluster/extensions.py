"""What our manifests need of a cluster beside Kubernetes itself: custom resources, and Kueue."""

from __future__ import annotations

import base64
import json
import socket
import subprocess
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.control_plane import ControlPlane, Kubectl, wait_for
from tests.cluster.programs import definitions, sources
from tests.manifests import tools

SCHEMAS = Path(__file__).resolve().parents[1] / "manifests" / "schemas"
# Kubeflow Pipelines is no Go module that can be fetched: its kinds have the schemas that the manifests' checks use.
FROM_SCHEMAS = {
    "pipeline-pipelines.kubeflow.org-v2beta1.json": ("Pipeline", "pipelines"),
    "pipelineversion-pipelines.kubeflow.org-v2beta1.json": ("PipelineVersion", "pipelineversions"),
}
KUEUE = "sigs.k8s.io/kueue"
KUEUE_NAMESPACE, KUEUE_SERVICE = "kueue-system", "kueue-webhook-service"
OF_KUEUE = {
    "Namespace", "CustomResourceDefinition", "Secret", "Service", "MutatingWebhookConfiguration",
    "ValidatingWebhookConfiguration",
}  # fmt: skip


def _structural(schema: dict[str, Any]) -> dict[str, Any]:
    """A JSON schema as an API server wants it: no refusal of unknown keys, since it drops or refuses them itself."""
    kept = {key: value for key, value in schema.items() if key in ("type", "properties", "items", "required", "enum")}
    if "properties" in kept:
        kept["properties"] = {name: _structural(inner) for name, inner in kept["properties"].items()}
    if "items" in kept:
        kept["items"] = _structural(kept["items"])
    if isinstance(schema.get("additionalProperties"), dict):
        kept["additionalProperties"] = _structural(schema["additionalProperties"])
    if "type" not in kept or (kept["type"] == "object" and not {"properties", "additionalProperties"} & set(kept)):
        kept["x-kubernetes-preserve-unknown-fields"] = True
    return kept


def definition(file: str, kind: str, plural: str) -> dict[str, Any]:
    """A CustomResourceDefinition made of one of tests/manifests/schemas."""
    group, version = file.removesuffix(".json").split("-")[1:]
    schema = _structural(json.loads((SCHEMAS / file).read_text()))
    schema["properties"] = {"spec": schema["properties"]["spec"]}
    schema["required"] = [name for name in schema.get("required", []) if name == "spec"]
    names = {"kind": kind, "listKind": f"{kind}List", "plural": plural, "singular": kind.lower()}
    served = {
        "name": version,
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": {**schema, "type": "object"}},
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{group}"},
        "spec": {"group": group, "names": names, "scope": "Namespaced", "versions": [served]},
    }


def install_definitions(cluster: ControlPlane) -> None:
    """All CustomResourceDefinitions, established when this returns."""
    wanted = [one for path in definitions() for one in yaml.safe_load_all(path.read_text()) if one]
    wanted += [definition(file, *names) for file, names in FROM_SCHEMAS.items()]
    apply(cluster, wanted)
    wait_for_definitions(cluster, wanted)


def wait_for_definitions(cluster: ControlPlane, wanted: list[dict[str, Any]]) -> None:
    """Return when the API server serves these custom resources."""
    names = [f"crd/{one['metadata']['name']}" for one in wanted if one["kind"] == "CustomResourceDefinition"]
    cluster.kubectl("wait", "--for=condition=Established", "--timeout=60s", *names)


def install_kueue(cluster: ControlPlane) -> None:
    """Kueue as its own manifests install it, its Deployment apart: that process runs on this machine.

    The API server reaches its webhooks by their service, whose one endpoint is this machine, and the certificate that
    Kueue makes for them is brought to its folder, as a kubelet would.
    """
    wanted = [one for one in built(sources(KUEUE) / "config/default") if one["kind"] in OF_KUEUE]
    wanted = [one for one in wanted if one["kind"] != "Service" or one["metadata"]["name"] == KUEUE_SERVICE]
    for one in wanted:
        if one["kind"] == "Service":
            one["spec"] = {"ports": [{"name": "https", "port": 443, "targetPort": cluster.webhook}]}
    endpoint = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": KUEUE_SERVICE,
            "namespace": KUEUE_NAMESPACE,
            "labels": {"kubernetes.io/service-name": KUEUE_SERVICE},
        },
        "addressType": "IPv4",
        "endpoints": [{"addresses": [cluster.host], "conditions": {"ready": True}}],
        "ports": [{"name": "https", "port": cluster.webhook, "protocol": "TCP"}],
    }
    apply(cluster, [one for one in wanted if "Webhook" not in one["kind"]] + [endpoint])
    wait_for_definitions(cluster, wanted)
    apply(cluster, [one for one in wanted if "Webhook" in one["kind"]])
    cluster.start("kueue")
    secret = ("get", "secret", "kueue-webhook-server-cert", f"--namespace={KUEUE_NAMESPACE}", "--output=json")

    def certificate() -> dict[str, str]:
        return dict(json.loads(cluster.kubectl(*secret)).get("data") or {})

    wait_for(lambda: "tls.key" in certificate() and cluster.alive("kueue"), "Kueue making its certificate")
    for name, value in certificate().items():
        (cluster.directory / "webhook" / name).write_bytes(base64.b64decode(value))
    wait_for(lambda: cluster.alive("kueue") and _listens(cluster), "Kueue's webhooks answering")


def _listens(cluster: ControlPlane) -> bool:
    try:
        socket.create_connection((cluster.host, cluster.webhook), timeout=1).close()
    except OSError:
        return False
    return True


def built(folder: Path) -> list[dict[str, Any]]:
    """What Kustomize makes of a folder."""
    program = tools.tool("kustomize", build=True)
    done = subprocess.run([str(program), "build", str(folder)], capture_output=True, text=True, timeout=120, check=True)
    return [one for one in yaml.safe_load_all(done.stdout) if one]


def apply(cluster: Kubectl, wanted: list[dict[str, Any]], *arguments: str) -> str:
    """Apply on the server, strictly; what kubectl prints, warnings included. Raises RuntimeError when it is refused."""
    done = cluster.run(
        "apply", "--server-side", "--validate=strict", *arguments, "--filename=-", input=yaml.safe_dump_all(wanted)
    )
    return done.stdout + done.stderr
