"""The RayJob of a distributed stage, as the Kubernetes API takes it (ray.io/v1, KubeRay 1.5).

HTTPMode: the operator itself submits the job to Ray's dashboard, under an id that it keeps in the RayJob's status. So
there is no pod that submits, and none that Kueue would have to count; and where the head's pod is lost, the operator
finds no job of that id on the new one and submits it again, which goes on from the stage's training state.

Every pod gets the environment of the watcher's own container as the cluster has made it (values and references to
secrets, never what a secret holds), its image, and the Pod Security Standard `restricted`.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from components.runtime import ray_block
from components.runtime.ray_block import PodResources, RayBlock

API, LEASES = "/apis/ray.io/v1", "/apis/coordination.k8s.io/v1"
USER = 10001  # the numeric user of the images
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
PART_OF, COMPONENT = "app.kubernetes.io/part-of", "app.kubernetes.io/component"
LABELS = {PART_OF: "sparseline", COMPONENT: "ray-job"}  # of every RayJob of ours, and of its pods
SELECTOR = ",".join(f"{key}={value}" for key, value in LABELS.items())
RUN, STAGE = "sparseline.dev/run", "sparseline.dev/stage"
REQUEST, DIGEST = "sparseline.dev/request", "sparseline.dev/request-digest"
AGENT_PORT, HEALTH_PATH = 52365, "/api/healthz"  # Ray's agent tells of its node there
# What Argo and Kubeflow Pipelines put into a container for themselves.
NOT_PASSED_ON = ("ARGO_", "KFP_", "SPARSELINE_POD_", ray_block.VARIABLE)


@dataclass(frozen=True)
class Watcher:
    """The pod that makes and watches the RayJob: who it is, and its specification as the API server has it."""

    name: str
    uid: str
    namespace: str
    spec: Mapping[str, Any]

    def reference(self) -> dict[str, Any]:
        """So that the RayJob is removed with the pod. It does not hold the pod's own removal up."""
        about = {"apiVersion": "v1", "kind": "Pod", "name": self.name, "uid": self.uid}
        return {**about, "controller": False, "blockOwnerDeletion": False}


def job_name(run_id: str, stage: str) -> str:
    """The one name that a stage of a run has, whoever watches it: a DNS label of at most 47 characters."""
    return f"{stage.replace('_', '-')[:30]}-{hashlib.sha256(f'{run_id}/{stage}'.encode()).hexdigest()[:12]}"


def lease(watcher: Watcher, job: Mapping[str, Any]) -> dict[str, Any]:
    """The sign that `watcher` lives, renewed at each call: a Lease that has the name of the RayJob and goes with it.

    Not a note in the RayJob itself: every change of one calls Kueue's webhook and wakes two controllers, and a watcher
    must not seem dead because Kueue is away.
    """
    metadata = job["metadata"]
    about = {"apiVersion": "ray.io/v1", "kind": "RayJob", "name": metadata["name"], "uid": metadata["uid"]}
    return {
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": {
            "name": metadata["name"],
            "labels": dict(LABELS),
            "ownerReferences": [{**about, "controller": False, "blockOwnerDeletion": False}],
        },
        "spec": {"holderIdentity": watcher.name, "renewTime": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%fZ}"},
    }


def ray_job(
    watcher: Watcher, block: RayBlock, run_id: str, stage: str, uri: str, digest: str, environment: Mapping[str, str]
) -> dict[str, Any]:
    """The whole RayJob. `uri`, `digest`: of the request; `environment`: what the watcher's own variables hold."""
    labels = {**LABELS, RUN: run_id, STAGE: stage}
    spec = {
        "submissionMode": "HTTPMode",
        "entrypoint": f"python -m components.runtime.ray_stage --request {shlex.quote(uri)}",
        "activeDeadlineSeconds": block.timeout,
        "backoffLimit": 0,  # whether a failed stage is tried again is said in the task
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 0,  # the result lies in the store: nobody needs the pods any more
        "rayClusterSpec": {
            "rayVersion": version("ray"),
            "headGroupSpec": {
                "serviceType": "ClusterIP",
                "rayStartParams": _head_parameters(block),
                "template": _pod(watcher, block.head, labels, environment, head=True),
            },
            "workerGroupSpecs": _workers(watcher, block, labels, environment),
        },
    }
    queue = {QUEUE_LABEL: block.queue} if block.queue else {}
    metadata = {
        "name": job_name(run_id, stage),
        "namespace": watcher.namespace,
        "labels": {**labels, **queue},
        "annotations": {REQUEST: uri, DIGEST: digest},
        "ownerReferences": [watcher.reference()],
    }
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": metadata, "spec": spec}


def _head_parameters(block: RayBlock) -> dict[str, str]:
    """Where there are workers, Ray places nothing beside the stage itself: its CPUs and GPUs are the learner's."""
    alone = {"num-cpus": "0", "num-gpus": "0"} if block.workers.workers else {}
    return {"dashboard-host": "0.0.0.0", **alone}


def _workers(
    watcher: Watcher, block: RayBlock, labels: Mapping[str, str], environment: Mapping[str, str]
) -> list[dict[str, Any]]:
    count = block.workers.workers
    if not count:
        return []
    template = _pod(watcher, block.workers, labels, environment, head=False)
    about = {"groupName": "workers", "replicas": count, "minReplicas": count, "maxReplicas": count}
    return [{**about, "rayStartParams": {}, "template": template}]


def _pod(
    watcher: Watcher,
    resources: PodResources,
    labels: Mapping[str, str],
    environment: Mapping[str, str],
    *,
    head: bool,
) -> dict[str, Any]:
    own = own_container(watcher.spec)
    amounts = {"cpu": resources.cpu, "memory": resources.memory}
    if resources.gpus:
        amounts[resources.gpu_resource] = str(resources.gpus)
    probe = {"httpGet": {"path": HEALTH_PATH, "port": AGENT_PORT}, "timeoutSeconds": 5}
    container = {
        "name": "ray-head" if head else "ray-worker",
        "image": own["image"],
        **({"imagePullPolicy": own["imagePullPolicy"]} if "imagePullPolicy" in own else {}),
        **({"envFrom": own["envFrom"]} if own.get("envFrom") else {}),
        "env": variables(own, environment),
        **({"ports": _ports()} if head else {}),
        "resources": {"requests": amounts, "limits": dict(amounts)},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
        # KubeRay's own probes need wget, which the image does not have.
        "readinessProbe": {**probe, "initialDelaySeconds": 5, "periodSeconds": 5, "failureThreshold": 10},
        "livenessProbe": {**probe, "initialDelaySeconds": 30, "periodSeconds": 10, "failureThreshold": 60},
    }
    metrics = {"prometheus.io/scrape": "true", "prometheus.io/port": environment.get("SPARSELINE_METRICS_PORT", "")}
    return {
        "metadata": {"labels": dict(labels), **({"annotations": metrics} if head and all(metrics.values()) else {})},
        "spec": {
            "containers": [container],
            "volumes": [{"name": "tmp", "emptyDir": {"sizeLimit": resources.scratch}}],
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": USER,
                "runAsGroup": USER,
                "fsGroup": USER,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            # The account only for its pull secrets: no token of it is mounted.
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            **{key: watcher.spec[key] for key in ("serviceAccountName", "imagePullSecrets") if watcher.spec.get(key)},
            **({"nodeSelector": resources.node_selector} if resources.node_selector else {}),
            **({"tolerations": [one.model_dump(exclude_none=True) for one in resources.tolerations]}
               if resources.tolerations else {}),
        },
    }  # fmt: skip


def _ports() -> list[dict[str, Any]]:
    found = (("gcs-server", 6379), ("dashboard", 8265), ("client", 10001))
    return [{"name": name, "containerPort": port} for name, port in found]


def own_container(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The container in which the watcher runs: Argo calls it `main`."""
    containers = list(spec["containers"])
    return dict(next((one for one in containers if one["name"] == "main"), containers[0]))


def variables(own: Mapping[str, Any], environment: Mapping[str, str]) -> list[dict[str, Any]]:
    """The watcher's variables for other pods. What refers to the watcher's own pod is given by its value."""
    passed = []
    for one in own.get("env") or []:
        source = one.get("valueFrom") or {}
        if one["name"].startswith(NOT_PASSED_ON) or "resourceFieldRef" in source:
            continue
        if "fieldRef" in source:
            passed.append({"name": one["name"], "value": environment.get(one["name"], "")})
        else:
            passed.append(dict(one))
    # KubeRay 1.5 gives Ray no token. Who may talk to it is what the network policies say.
    return [*(one for one in passed if one["name"] != "RAY_AUTH_MODE"), {"name": "RAY_AUTH_MODE", "value": "disabled"}]
