"""Plays the kubelet where there is no node: pods of jobs succeed, all others run and are ready.

Only the status of pods is written, by the API that a kubelet uses; what makes and removes them is real.
"""

from __future__ import annotations

import threading
from typing import Any

import urllib3
from kubernetes import client, config
from kubernetes.client.exceptions import ApiException

from tests.cluster.control_plane import Kubectl

NODE = "node1"  # no machine: an object that pods are bound to, for services lead only to pods that have a node
LEFT_ALONE = "ray.io/cluster"  # whoever tests Ray says what its pods do


def core_api(cluster: Kubectl) -> client.CoreV1Api:
    """Pods and their status, as whoever is in the cluster's kubeconfig; a call that fails is not made again."""
    settings = client.Configuration()
    config.load_kube_config(str(cluster.kubeconfig), client_configuration=settings)
    settings.retries = urllib3.Retry(0)
    return client.CoreV1Api(client.ApiClient(settings))


def bind(api: client.CoreV1Api, pod: Any) -> None:
    """Give the pod the node, as a scheduler does."""
    if not pod.spec.node_name:
        target = client.V1Binding(
            metadata=client.V1ObjectMeta(name=pod.metadata.name),
            target=client.V1ObjectReference(api_version="v1", kind="Node", name=NODE),
        )
        name, namespace = pod.metadata.name, pod.metadata.namespace
        api.create_namespaced_pod_binding(name, namespace, target, _preload_content=False)


def end(api: client.CoreV1Api, pod: Any) -> None:
    """Say that all of a pod that is to be deleted has ended: only then it goes."""
    api.delete_namespaced_pod(pod.metadata.name, pod.metadata.namespace, grace_period_seconds=0)


def finished(pod: Any, exit_code: int = 0) -> dict[str, Any]:
    """The status of a pod whose containers all ended with this code."""
    ended = {"terminated": {"exitCode": exit_code, "reason": "Error" if exit_code else "Completed"}}
    phase = "Failed" if exit_code else "Succeeded"
    return {"phase": phase, "containerStatuses": [_container(one, ended, ready=False) for one in pod.spec.containers]}


def running(pod: Any, address: str) -> dict[str, Any]:
    """The status of a pod that runs and is ready at this address."""
    conditions = [
        {"type": name, "status": "True"} for name in ("PodScheduled", "Initialized", "ContainersReady", "Ready")
    ]
    statuses = [_container(one, {"running": {}}, ready=True) for one in pod.spec.containers]
    addresses = {"podIP": address, "podIPs": [{"ip": address}], "hostIP": address}
    return {"phase": "Running", "conditions": conditions, "containerStatuses": statuses, **addresses}


def _container(container: Any, state: dict[str, Any], *, ready: bool) -> dict[str, Any]:
    about = {"name": container.name, "image": container.image, "imageID": container.image, "restartCount": 0}
    return {**about, "ready": ready, "started": ready, "state": state}


class Kubelet:
    """A thread that gives every pending pod the end that its kind has."""

    exit_code = 0  # of the pods that end

    def __init__(self, cluster: Kubectl) -> None:
        self.host, self.api = cluster.host, core_api(cluster)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._play, name="kubelet", daemon=True)
        self._thread.start()

    def _play(self) -> None:
        while not self._end.wait(0.2):
            try:
                for pod in self.api.list_pod_for_all_namespaces(resource_version="0").items:
                    if LEFT_ALONE in (pod.metadata.labels or {}):
                        continue
                    if pod.metadata.deletion_timestamp:
                        end(self.api, pod)
                    elif pod.status.phase == "Pending":
                        self.give(pod)
            except (ApiException, urllib3.exceptions.HTTPError):
                continue  # the API server is away, or the pod is gone: the next look tells

    def give(self, pod: Any) -> None:
        """Let a pod run, or succeed where a job or Helm's test waits for its end."""
        bind(self.api, pod)
        ends = pod.spec.restart_policy in ("Never", "OnFailure")
        status = finished(pod, self.exit_code) if ends else running(pod, self.host)
        self.api.patch_namespaced_pod_status(pod.metadata.name, pod.metadata.namespace, {"status": status})

    def stop(self) -> None:
        self._end.set()
        self._thread.join()
