"""Plays the node of Ray's pods: the head's pod is a real Ray head of this machine, as long as the pod is there."""

from __future__ import annotations

import subprocess
import tempfile
import threading
from pathlib import Path

import urllib3
from kubernetes.client.exceptions import ApiException

from tests.cluster.control_plane import ControlPlane
from tests.cluster.pods import bind, core_api, end, running
from tests.components.post_training.ray_host import answers, start_head, stop_head

DASHBOARD = 8265  # KubeRay's service leads to this port of the head's pod


class RayNode:
    """Starts a head for every pending head's pod of a namespace, and ends it when the pod is gone."""

    def __init__(self, cluster: ControlPlane, namespace: str, environment: dict[str, str]) -> None:
        self.host, self.namespace, self.environment = cluster.host, namespace, environment
        self.api = core_api(cluster)
        self.heads: dict[str, tuple[subprocess.Popen, Path]] = {}
        self.idle = False  # start no more pods; what runs goes on
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._play, name="ray node", daemon=True)
        self._thread.start()

    def _play(self) -> None:
        while not self._end.wait(0.3):
            try:
                pods = self.api.list_namespaced_pod(self.namespace, label_selector="ray.io/node-type").items
                for name in set(self.heads) - {pod.metadata.name for pod in pods}:
                    stop_head(*self.heads.pop(name))
                for pod in pods:
                    if pod.metadata.deletion_timestamp:
                        if pod.metadata.name in self.heads:
                            stop_head(*self.heads.pop(pod.metadata.name))
                        end(self.api, pod)
                    elif pod.status.phase == "Pending" and not self.idle:
                        self._start(pod)
            except (ApiException, urllib3.exceptions.HTTPError):
                continue  # the API server is away, or the pod is gone

    def _start(self, pod) -> None:
        name = pod.metadata.name
        if pod.metadata.labels["ray.io/node-type"] == "head" and name not in self.heads:
            folder = Path(tempfile.mkdtemp(prefix="rayhead-", dir="/tmp"))
            variables = pod.spec.containers[0].env
            own = {one.name: one.value for one in variables if one.value and one.name.startswith("SPARSELINE_")}
            self.heads[name] = (start_head(folder, self.host, DASHBOARD, {**own, **self.environment}), folder)
        if name not in self.heads or answers(self.host, DASHBOARD):
            bind(self.api, pod)
            status = running(pod, self.host)
            self.api.patch_namespaced_pod_status(name, self.namespace, {"status": status})

    def stop(self) -> None:
        self._end.set()
        self._thread.join()
        for name in list(self.heads):
            stop_head(*self.heads.pop(name))
