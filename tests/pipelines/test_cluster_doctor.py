"""`sparseline doctor --cluster` on answers of an API server, good ones and each with one thing wrong.

With SPARSELINE_TEST_KUBECONFIG set to the kubeconfig of a bare cluster (an API server is enough), it is asked, too.
"""

import copy
import io
import os
import socket

import pytest
from rich.console import Console

from components.runtime.errors import InputError
from components.runtime.ray_block import RayWorkers
from pipelines import cluster_doctor
from pipelines.cluster import SETTING_NAMES, TaskResources
from pipelines.cluster_doctor import CHECKS, PERMISSIONS, Cluster, Place, findings
from pipelines.stages import STAGES

SETTINGS = {name: "x" for name in SETTING_NAMES} | {
    "SPARSELINE_STORE": "s3://sparseline",
    "SPARSELINE_S3_ENDPOINT": "https://s3.example.com",
    "MLFLOW_TRACKING_URI": "http://sparseline-mlflow.sparseline.svc:5000",
}
SLICES = (
    "/apis/discovery.k8s.io/v1/namespaces/sparseline/endpointslices?labelSelector=kubernetes.io/service-name%3D"
    "sparseline-mlflow"
)
RESTRICTED = {"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "restricted"}}}
SECRET = {"data": {"accesskey": "eA==", "secretkey": "eA=="}}
NODE = {
    "metadata": {"name": "a", "labels": {"gpu": "h100"}},
    "status": {"conditions": [{"type": "Ready", "status": "True"}], "allocatable": {"cpu": "8", "nvidia.com/gpu": "8"}},
}
GOOD = {
    "/version": {"major": "1", "minor": "36+", "gitVersion": "v1.36.3"},
    "/apis": {"groups": [{"name": name} for name in cluster_doctor.GROUPS]},
    "/api/v1/namespaces/sparseline": RESTRICTED,
    "/api/v1/namespaces/kubeflow": {"metadata": {}},
    "/api/v1/namespaces/kubeflow/resourcequotas": {"items": [{}]},
    "/apis/apps/v1/namespaces/kubeflow/deployments/ml-pipeline": {
        "spec": {"template": {"spec": {"containers": [{"image": "ghcr.io/kubeflow/kfp-api-server:2.17.0"}]}}},
        "status": {"availableReplicas": 1},
    },
    "/apis/storage.k8s.io/v1/storageclasses": {
        "items": [
            {
                "metadata": {
                    "name": "standard",
                    "annotations": {"storageclass.kubernetes.io/is-default-class": "true"},
                }
            }
        ]
    },
    "/api/v1/nodes": {"items": [NODE]},
    "/api/v1/namespaces/sparseline/secrets/sparseline-store": SECRET,
    "/api/v1/namespaces/kubeflow/secrets/sparseline-store": SECRET,
    "/api/v1/namespaces/kubeflow/configmaps/sparseline-settings": {"data": SETTINGS},
    SLICES: {"items": [{"endpoints": [{"conditions": {"ready": True}}]}]},
}
GPUS = TaskResources(gpus=8, node_selector={"gpu": "h100"})


class Answers(Cluster):
    """Answers that were given before; permissions are granted unless they are among `denied`."""

    def __init__(self, answers, denied=()):
        self.answers, self.denied, self.forbidden, self.host = answers, denied, [], "https://example.com"

    def _call(self, method, path, body):
        if method == "POST":
            wanted = body["spec"]["resourceAttributes"]
            return {"status": {"allowed": (wanted["verb"], wanted["resource"]) not in self.denied}}
        found = self.answers.get(path)
        if found == "forbidden":
            self.forbidden.append(path)
            return None
        return found


def found(answers=GOOD, denied=(), resources=None):
    place = Place("sparseline", "kubeflow", dict.fromkeys(STAGES, TaskResources()) | (resources or {}))
    return findings(Answers(answers, denied), place)


def test_on_a_good_cluster_nothing_is_missing():
    told = found(resources={"post_training": GPUS})
    assert [one for one in told if one.state == "missing"] == []
    assert [one.text for one in told if one.state == "note"] == [
        "the object store at https://s3.example.com lies outside of the cluster: not tried from here"
    ]
    assert len(told) > len(CHECKS)


def changed(path, value):
    answers = copy.deepcopy(GOOD)
    answers[path] = value
    return answers


BAD = {
    "an old Kubernetes": (
        "/version",
        {"major": "1", "minor": "31", "gitVersion": "v1.31.2"},
        "missing",
        "too old: 1.32",
    ),
    "a new Kubernetes": ("/version", {"major": "1", "minor": "40", "gitVersion": "v1.40.0"}, "note", "newer than"),
    "no workflows": ("/apis", {"groups": []}, "missing", "no custom resources of argoproj.io"),
    "no namespace": ("/api/v1/namespaces/sparseline", None, "missing", "no namespace sparseline"),
    "no quota": ("/api/v1/namespaces/kubeflow/resourcequotas", {"items": []}, "note", "has no quota"),
    "pods may do all": ("/api/v1/namespaces/sparseline", {"metadata": {}}, "note", "lets pods do more"),
    "no KFP": ("/apis/apps/v1/namespaces/kubeflow/deployments/ml-pipeline", None, "missing", "no Kubeflow Pipelines"),
    "no storage class": ("/apis/storage.k8s.io/v1/storageclasses", {"items": []}, "missing", "no storage class"),
    "no default class": (
        "/apis/storage.k8s.io/v1/storageclasses",
        {"items": [{"metadata": {"name": "slow"}}]},
        "missing",
        "no default storage class",
    ),
    "no secret": (
        "/api/v1/namespaces/kubeflow/secrets/sparseline-store",
        None,
        "missing",
        "no secret sparseline-store",
    ),
    "a secret without a key": (
        "/api/v1/namespaces/kubeflow/secrets/sparseline-store",
        {"data": {"accesskey": "eA=="}},
        "missing",
        "lacks secretkey",
    ),
    "a secret that is not ours to read": (
        "/api/v1/namespaces/kubeflow/secrets/sparseline-store",
        "forbidden",
        "note",
        "may not be read by you",
    ),
    "nodes that are not ours to see": ("/api/v1/nodes", "forbidden", "note", "you may not look at /api/v1/nodes"),
    "no settings": (
        "/api/v1/namespaces/kubeflow/configmaps/sparseline-settings",
        None,
        "missing",
        "is it one of the chart's teams?",
    ),
    "settings of an older chart": (
        "/api/v1/namespaces/kubeflow/configmaps/sparseline-settings",
        {"data": {name: value for name, value in SETTINGS.items() if name != "AWS_REGION"}},
        "missing",
        "lacks AWS_REGION",
    ),
    "MLflow down": (
        SLICES,
        {"items": [{"endpoints": [{"conditions": {"ready": False}}]}]},
        "missing",
        "no pod that is",
    ),
    "no MLflow": (SLICES, {"items": []}, "missing", "no pod that is ready"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_told_with_a_command(case):
    path, value, state, told = BAD[case]
    (one,) = [one for one in found(changed(path, value)) if told in one.text]
    assert one.state == state
    if state == "missing":
        assert one.fix


@pytest.mark.parametrize(
    "resources",
    [
        TaskResources(gpus=16),
        TaskResources(gpus=1, gpu_resource="amd.com/gpu"),
        TaskResources(gpus=1, node_selector={"gpu": "b200"}),
    ],
)
def test_a_profile_that_no_node_can_serve_is_told(resources):
    (one,) = [one for one in found(resources={"post_training": resources}) if "no node has that" in one.text]
    assert one.state == "missing"
    assert "post_training wants" in one.text
    assert "allocatable" in one.fix


def test_a_node_that_is_not_ready_does_not_count():
    down = copy.deepcopy(NODE)
    down["status"]["conditions"] = [{"type": "Ready", "status": "Unknown"}]
    told = found(changed("/api/v1/nodes", {"items": [down]}), resources={"post_training": GPUS})
    assert {one.text for one in told if one.state == "missing"} == {
        "0 nodes ready",
        "post_training wants 8 nvidia.com/gpu on nodes with gpu=h100: no node has that",
    }


def test_a_queue_in_the_profile_wants_kueue():
    assert not [one for one in found() if "kueue" in one.text]
    (one,) = [one for one in found(resources={"synthesis": TaskResources(queue="team")}) if "kueue" in one.text]
    assert one.state == "missing"


QUEUE = "/apis/kueue.x-k8s.io/v1beta2/namespaces/kubeflow/localqueues/team"
ROLE = "/apis/rbac.authorization.k8s.io/v1/namespaces/kubeflow/rolebindings/sparseline-distributed"
REAPER = "/apis/apps/v1/namespaces/sparseline/deployments?labelSelector=app.kubernetes.io/component%3Dreaper"
RAY = {"post_training": TaskResources(queue="team", ray=RayWorkers(workers=2, gpus=8))}
WITH_RAY = GOOD | {
    "/apis": {"groups": [{"name": name} for name in (*cluster_doctor.GROUPS, "ray.io", "kueue.x-k8s.io")]},
    QUEUE: {"metadata": {}},
    ROLE: {"metadata": {}},
    REAPER: {"items": [{"status": {"availableReplicas": 1}}]},
}


def test_a_cluster_for_rayjobs_lacks_nothing():
    assert [one for one in found(WITH_RAY, resources=RAY) if one.state == "missing"] == []
    assert not [one for one in found() if "RayJob" in one.text]  # a profile without them is not told about them


@pytest.mark.parametrize(
    "path, value, told",
    [
        ("/apis", GOOD["/apis"], "no custom resources of ray.io"),
        (QUEUE, None, "no queue team in kubeflow"),
        (ROLE, None, "stages may not make RayJobs in kubeflow"),
        (REAPER, {"items": [{"status": {}}]}, "no reaper of RayJobs is ready in sparseline"),
        ("/api/v1/nodes", {"items": []}, "a worker of post_training wants 8 nvidia.com/gpu: no node has that"),
    ],
)
def test_what_rayjobs_lack_is_told_with_a_command(path, value, told):
    (one,) = [one for one in found(WITH_RAY | {path: value}, resources=RAY) if one.text.startswith(told)]
    assert one.state == "missing"
    assert one.fix


@pytest.mark.parametrize("place, verb, group, resource", PERMISSIONS)
def test_each_permission_that_lacks_is_told(place, verb, group, resource):
    kind = resource.split("/")[0]
    told = [one for one in found(denied={(verb, kind)}) if one.text.startswith("you may not")]
    namespace = {"platform": "sparseline", "runs": "kubeflow"}[place]
    assert f"you may not {verb} {resource} in {namespace}" in {one.text for one in told}
    assert all(one.state == "missing" and "rolebinding" in one.fix for one in told)


def write_kubeconfig(path, server):
    path.write_text(
        "apiVersion: v1\nkind: Config\ncurrent-context: x\n"
        f"clusters: [{{name: c, cluster: {{server: '{server}', insecure-skip-tls-verify: true}}}}]\n"
        "users: [{name: u, user: {token: none}}]\ncontexts: [{name: x, context: {cluster: c, user: u}}]\n"
    )
    return path


def ask(profile="micro", context=""):
    console = Console(file=io.StringIO(), width=200)
    return cluster_doctor.doctor(profile, "sparseline", "kubeflow", context, console), console.file.getvalue()


def test_no_cluster_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    with pytest.raises(InputError, match=r"no kubeconfig can be used(.|\n)*set KUBECONFIG"):
        ask()
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    path = write_kubeconfig(tmp_path / "config", f"http://127.0.0.1:{port}")
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(path))
    with pytest.raises(InputError, match=r"cannot be reached(.|\n)*kubectl cluster-info"):
        ask()
    with pytest.raises(InputError, match="no kubeconfig can be used"):
        ask(context="other")
    with pytest.raises(InputError, match="unknown profile"):
        ask(profile="giant")


REAL = os.environ.get("SPARSELINE_TEST_KUBECONFIG", "")


@pytest.mark.skipif(not REAL, reason="SPARSELINE_TEST_KUBECONFIG names no cluster")
def test_a_real_api_server_is_asked(monkeypatch):
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", REAL)
    code, told = ask()
    assert code == 2
    for line in ("ok       Kubernetes v", "missing  no namespace sparseline", "missing  no storage class",
                 f"ok       {len(PERMISSIONS)} permissions", "missing  0 nodes ready"):  # fmt: skip
        assert line in told, told
    assert "you may not look" not in told
