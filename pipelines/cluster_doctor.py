"""`sparseline doctor --cluster`: what a cluster lacks for a profile, and the command that fixes it. Creates nothing.

Everything is read from the API server that the kubeconfig names, with the rights of whoever asks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from components.runtime import errors
from components.runtime.ray_block import PodResources
from pipelines import profiles
from pipelines.cluster import SETTING_NAMES, SETTINGS, STORE_SECRET, TaskResources, task_resources
from pipelines.cluster_api import Cluster

KUBERNETES = ((1, 32), (1, 37))  # the oldest and the newest version that the manifests are checked against
KFP_VERSION = "2.17"
SECRET_KEYS = ("accesskey", "secretkey")
KFP_MANIFESTS = "https://github.com/kubeflow/pipelines//manifests/kustomize"
MAKE_SECRET = (
    "kubectl -n {namespace} create secret generic sparseline-store --from-literal=accesskey=... "
    "--from-literal=secretkey=..."
)
# Group -> (needed, what for, command).
GROUPS: dict[str, tuple[bool, str, str]] = {
    "argoproj.io": (
        True,
        "Kubeflow Pipelines",
        f'kubectl apply --server-side -k "{KFP_MANIFESTS}/cluster-scoped-resources?ref=2.17.0" '
        "&& kubectl apply --server-side -k manifests/kfp",
    ),
    "kubeflow.org": (True, "schedules", f'kubectl apply -k "{KFP_MANIFESTS}/cluster-scoped-resources?ref=2.17.0"'),
    "pipelines.kubeflow.org": (
        False,
        "pipelines from Git; `sparseline submit` uploads them otherwise",
        "kubectl apply --server-side -k manifests/kfp",
    ),
    "cert-manager.io": (
        False,
        "the webhooks of Kubeflow Pipelines that keeps pipelines as custom resources",
        "helm install cert-manager jetstack/cert-manager -n cert-manager --create-namespace --set crds.enabled=true",
    ),
    "monitoring.coreos.com": (
        False,
        "monitoring.enabled of the chart",
        "helm install prometheus prometheus-community/kube-prometheus-stack -n monitoring --create-namespace",
    ),
}
QUEUES = (
    "kueue.x-k8s.io",
    "the queue in the profile",
    "kubectl apply --server-side -f https://github.com/kubernetes-sigs/kueue/releases/download/v0.17.0/manifests.yaml",
)
RAY = (
    "ray.io",
    "the stages that the profile runs as RayJobs",
    "helm repo add kuberay https://ray-project.github.io/kuberay-helm && helm install kuberay-operator "
    "kuberay/kuberay-operator --version 1.5.0 -n kuberay-operator --create-namespace",
)
# What installing and starting runs takes: (which namespace, verb, group, resource).
PERMISSIONS = (
    ("platform", "create", "apps", "deployments"),
    ("platform", "create", "apps", "statefulsets"),
    ("platform", "create", "", "services"),
    ("platform", "create", "", "configmaps"),
    ("platform", "create", "", "secrets"),
    ("platform", "create", "", "persistentvolumeclaims"),
    ("platform", "create", "batch", "jobs"),
    ("platform", "create", "networking.k8s.io", "networkpolicies"),
    ("platform", "create", "rbac.authorization.k8s.io", "roles"),
    ("runs", "create", "", "configmaps"),
    ("runs", "create", "", "secrets"),
    ("runs", "get", "", "pods"),
    ("runs", "create", "", "services/portforward"),
)


@dataclass(frozen=True)
class Finding:
    """`state` is ok, note or missing; `fix` is the command that mends what is not ok."""

    state: str
    text: str
    fix: str = ""


@dataclass(frozen=True)
class Place:
    """Where things are: the namespaces of the platform and of the runs, and the resources of the profile's tasks."""

    platform: str
    runs: str
    resources: dict[str, TaskResources]


def version(cluster: Cluster, place: Place) -> Iterator[Finding]:
    told = cluster.get("/version") or {}
    numbers = tuple(int(re.sub(r"\D", "", told.get(name, "0")) or 0) for name in ("major", "minor"))
    oldest, newest = (".".join(map(str, one)) for one in KUBERNETES)
    text = f"Kubernetes {told.get('gitVersion', 'of unknown version')} at {cluster.host}"
    if numbers < KUBERNETES[0]:
        yield Finding("missing", f"{text} is too old: {oldest} to {newest} are supported", "upgrade the control plane")
    elif numbers > KUBERNETES[1]:
        yield Finding("note", f"{text} is newer than what was checked ({oldest} to {newest})")
    else:
        yield Finding("ok", text)


def groups(cluster: Cluster, place: Place) -> Iterator[Finding]:
    there = {one["name"] for one in (cluster.get("/apis") or {}).get("groups", [])}
    wanted = dict(GROUPS)
    if any(one.queue for one in place.resources.values()):
        wanted[QUEUES[0]] = (True, *QUEUES[1:])
    if any(one.ray for one in place.resources.values()):
        wanted[RAY[0]] = (True, *RAY[1:])
    for name, (needed, purpose, command) in wanted.items():
        if name in there:
            yield Finding("ok", f"custom resources of {name} ({purpose})")
        else:
            state = "missing" if needed else "note"
            yield Finding(state, f"no custom resources of {name}: needed for {purpose}", command)


def queues(cluster: Cluster, place: Place) -> Iterator[Finding]:
    """Whether the queues that the profile names are in the namespace of the runs."""
    for name in sorted({one.queue for one in place.resources.values()} - {""}):
        path = f"/apis/kueue.x-k8s.io/v1beta2/namespaces/{place.runs}/localqueues/{name}"
        if cluster.get(path):
            yield Finding("ok", f"queue {name} in {place.runs}")
        elif path not in cluster.forbidden:
            queue = {"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": "LocalQueue", "metadata": {"name": name}}
            made = json.dumps({**queue, "spec": {"clusterQueue": "CLUSTER-QUEUE"}})
            yield Finding(
                "missing",
                f"no queue {name} in {place.runs}: what the profile puts into it would wait for ever",
                f"kubectl get clusterqueues; echo '{made}' | kubectl -n {place.runs} apply -f -",
            )


def distributed(cluster: Cluster, place: Place) -> Iterator[Finding]:
    """Whether the chart lets stages make RayJobs, and whether something sees to those that nobody watches."""
    if not any(one.ray for one in place.resources.values()):
        return
    install = (
        f"helm upgrade sparseline charts/sparseline -n {place.platform} --reuse-values --set distributed.enabled=true"
    )
    role = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{place.runs}/rolebindings/sparseline-distributed"
    if cluster.get(role):
        yield Finding("ok", f"stages may make RayJobs in {place.runs}")
    elif role not in cluster.forbidden:
        yield Finding(
            "missing", f"stages may not make RayJobs in {place.runs} (distributed.enabled of the chart)", install
        )
    selector = "labelSelector=app.kubernetes.io/component%3Dreaper"
    reapers = cluster.items(f"/apis/apps/v1/namespaces/{place.platform}/deployments?{selector}")
    if any((one.get("status") or {}).get("availableReplicas") for one in reapers):
        yield Finding("ok", "the reaper of RayJobs runs")
    else:
        yield Finding("missing", f"no reaper of RayJobs is ready in {place.platform}", install)


def namespaces(cluster: Cluster, place: Place) -> Iterator[Finding]:
    for name in dict.fromkeys((place.platform, place.runs)):
        found = cluster.get(f"/api/v1/namespaces/{name}")
        if found is None:
            command = "kubectl apply -k manifests/overlays/dev" if name == place.platform else ""
            yield Finding("missing", f"no namespace {name}", command or f"kubectl create namespace {name}")
            continue
        enforced = (found["metadata"].get("labels") or {}).get("pod-security.kubernetes.io/enforce", "nothing")
        yield Finding("ok", f"namespace {name} (Pod Security enforces {enforced})")
        if name == place.platform and enforced != "restricted":
            command = f"kubectl label namespace {name} pod-security.kubernetes.io/enforce=restricted"
            yield Finding("note", f"the namespace {name} lets pods do more than ours need", command)
        if name == place.runs and not cluster.items(f"/api/v1/namespaces/{name}/resourcequotas"):
            yield Finding(
                "note",
                f"the namespace {name} has no quota: one run may take the whole cluster",
                f"kubectl -n {name} create quota sparseline --hard=requests.cpu=32,requests.memory=128Gi",
            )


def kubeflow(cluster: Cluster, place: Place) -> Iterator[Finding]:
    found = cluster.get("/apis/apps/v1/namespaces/kubeflow/deployments/ml-pipeline")
    if found is None:
        yield Finding("missing", "no Kubeflow Pipelines in the namespace kubeflow", GROUPS["argoproj.io"][2])
        return
    image = found["spec"]["template"]["spec"]["containers"][0]["image"]
    if not (found.get("status") or {}).get("availableReplicas"):
        yield Finding(
            "missing",
            f"Kubeflow Pipelines ({image}) has no pod that is ready",
            "kubectl -n kubeflow describe deployment ml-pipeline; kubectl -n kubeflow logs deployment/ml-pipeline",
        )
    elif f":{KFP_VERSION}." not in image:
        yield Finding("note", f"Kubeflow Pipelines is {image}; {KFP_VERSION} is what was checked")
    else:
        yield Finding("ok", f"Kubeflow Pipelines {image.rsplit(':', 1)[1]}")


def permissions(cluster: Cluster, place: Place) -> Iterator[Finding]:
    missing = []
    for where, verb, group, resource in PERMISSIONS:
        namespace = place.platform if where == "platform" else place.runs
        kind, _, sub = resource.partition("/")
        attributes = {"namespace": namespace, "verb": verb, "group": group, "resource": kind, "subresource": sub}
        answer = cluster.post(
            "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", {"spec": {"resourceAttributes": attributes}}
        )
        if not (answer or {}).get("status", {}).get("allowed"):
            missing.append((namespace, verb, resource))
    for namespace, verb, resource in missing:
        yield Finding(
            "missing",
            f"you may not {verb} {resource} in {namespace}",
            f"an administrator: kubectl -n {namespace} create rolebinding sparseline --clusterrole=admin --user=YOU",
        )
    if not missing:
        yield Finding("ok", f"{len(PERMISSIONS)} permissions in {place.platform} and {place.runs}")


def storage(cluster: Cluster, place: Place) -> Iterator[Finding]:
    found = cluster.items("/apis/storage.k8s.io/v1/storageclasses")
    mark = "storageclass.kubernetes.io/is-default-class"
    default = [
        one["metadata"]["name"] for one in found if (one["metadata"].get("annotations") or {}).get(mark) == "true"
    ]
    if default:
        yield Finding("ok", f"storage class {default[0]} (default)")
    elif found:
        name = found[0]["metadata"]["name"]
        patch = json.dumps({"metadata": {"annotations": {mark: "true"}}})
        yield Finding("missing", "no default storage class", f"kubectl patch storageclass {name} -p '{patch}'")
    else:
        yield Finding(
            "missing",
            "no storage class: MLflow and an object store in the cluster need volumes",
            "install the CSI driver of your provider; on kind: kubectl apply -f https://raw.githubusercontent.com/rancher/"
            "local-path-provisioner/v0.0.32/deploy/local-path-storage.yaml",
        )


def nodes(cluster: Cluster, place: Place) -> Iterator[Finding]:
    """Whether each kind of task fits on some node, GPUs first."""
    ready = [one for one in cluster.items("/api/v1/nodes") if _is_ready(one)]
    yield Finding("ok" if ready else "missing", f"{len(ready)} nodes ready", "" if ready else "kubectl get nodes")
    asked: list[tuple[str, PodResources]] = []
    for name in sorted(place.resources):
        asked.append((name, place.resources[name]))
        if workers := place.resources[name].ray:
            asked.append((f"a worker of {name}", workers))
    for name, wanted in asked:
        if not wanted.gpus and not wanted.node_selector:
            continue
        fitting = [
            one
            for one in ready
            if wanted.node_selector.items() <= (one["metadata"].get("labels") or {}).items()
            and int(one["status"]["allocatable"].get(wanted.gpu_resource, 0)) >= wanted.gpus
        ]
        text = f"{name} wants {wanted.gpus} {wanted.gpu_resource}" + (
            f" on nodes with {', '.join(f'{key}={value}' for key, value in wanted.node_selector.items())}"
            if wanted.node_selector
            else ""
        )
        if fitting:
            yield Finding("ok", f"{text}: {len(fitting)} nodes")
        else:
            yield Finding(
                "missing",
                f"{text}: no node has that",
                "helm install gpu-operator nvidia/gpu-operator -n gpu-operator --create-namespace, or change `cluster` "
                "in the profile; what nodes offer: kubectl get nodes -o custom-columns=N:.metadata.name,"
                f"GPU:.status.allocatable.{wanted.gpu_resource.replace('.', chr(92) + '.')}",
            )


def _is_ready(node: dict[str, Any]) -> bool:
    conditions = node.get("status", {}).get("conditions") or []
    return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)


def surroundings(cluster: Cluster, place: Place) -> Iterator[Finding]:
    """The secret and the settings that tasks read, by key; values are not looked at."""
    for namespace in dict.fromkeys((place.platform, place.runs)):
        path = f"/api/v1/namespaces/{namespace}/secrets/{STORE_SECRET}"
        found = cluster.get(path)
        lacking = [key for key in SECRET_KEYS if key not in ((found or {}).get("data") or {})]
        if path in cluster.forbidden:
            yield Finding("note", f"the secret {STORE_SECRET} in {namespace} may not be read by you: not checked")
        elif found is None:
            yield Finding(
                "missing", f"no secret {STORE_SECRET} in {namespace}", MAKE_SECRET.format(namespace=namespace)
            )
        elif lacking:
            yield Finding(
                "missing",
                f"the secret {STORE_SECRET} in {namespace} lacks {', '.join(lacking)}",
                f"kubectl -n {namespace} delete secret {STORE_SECRET} && {MAKE_SECRET.format(namespace=namespace)}",
            )
        else:
            yield Finding("ok", f"secret {STORE_SECRET} in {namespace}")
    found = cluster.get(f"/api/v1/namespaces/{place.runs}/configmaps/{SETTINGS}")
    lacking = [key for key in SETTING_NAMES if key not in ((found or {}).get("data") or {})]
    install = f"helm upgrade --install sparseline charts/sparseline -n {place.platform} -f VALUES.yaml"
    if found is None:
        yield Finding(
            "missing",
            f"no settings (ConfigMap {SETTINGS}) in {place.runs}: is it one of the chart's teams?",
            f'{install} --set-json \'teams=[{{"namespace": "{place.runs}"}}]\'',
        )
    elif lacking:
        yield Finding("missing", f"the ConfigMap {SETTINGS} in {place.runs} lacks {', '.join(lacking)}", install)
    else:
        yield Finding("ok", f"settings in {place.runs}: store {found['data']['SPARSELINE_STORE']}")


def reachable(cluster: Cluster, place: Place) -> Iterator[Finding]:
    """Whether the services that tasks talk to have a pod behind them."""
    settings = (cluster.get(f"/api/v1/namespaces/{place.runs}/configmaps/{SETTINGS}") or {}).get("data") or {}
    for name, key in (("MLflow", "MLFLOW_TRACKING_URI"), ("the object store", "SPARSELINE_S3_ENDPOINT")):
        address = settings.get(key, "")
        inside = re.fullmatch(r"https?://([a-z0-9-]+)\.([a-z0-9-]+)\.svc(?:\.[a-z.]+)?(?::\d+)?/?", address)
        if not address:
            continue
        if not inside:
            yield Finding(
                "note",
                f"{name} at {address} lies outside of the cluster: not tried from here",
                f"kubectl -n {place.runs} run reach --rm -i --restart=Never --image=curlimages/curl -- -sv {address}",
            )
            continue
        service, namespace = inside.groups()
        slices = cluster.items(
            f"/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices"
            f"?labelSelector=kubernetes.io/service-name%3D{service}"
        )
        ends = [end for one in slices for end in one.get("endpoints") or []]
        if any((end.get("conditions") or {}).get("ready", True) for end in ends):
            yield Finding("ok", f"{name} at {address}")
        else:
            yield Finding(
                "missing",
                f"{name} at {address} has no pod that is ready",
                f"kubectl -n {namespace} get pods,events; helm test sparseline -n {place.platform}",
            )


CHECKS: tuple[Callable[[Cluster, Place], Iterator[Finding]], ...] = (
    version, groups, queues, distributed, namespaces, kubeflow, permissions, storage, nodes, surroundings, reachable,
)  # fmt: skip


def findings(cluster: Cluster, place: Place) -> list[Finding]:
    """What every check found, in order, and what we were not allowed to look at."""
    found = [one for check in CHECKS for one in check(cluster, place)]
    hidden = sorted({path for path in cluster.forbidden if not path.endswith(f"/secrets/{STORE_SECRET}")})
    if hidden:
        text = f"you may not look at {', '.join(hidden)}: what is missing there cannot be told"
        found.append(Finding("note", text, "ask for the cluster role `view`, or for an administrator to run this"))
    return found


def doctor(profile: str, platform: str, runs: str, context: str, console: Console) -> int:
    """Print the findings. Returns 0, or 2 when something is missing."""
    loaded = profiles.load(profile)
    place = Place(platform, runs, task_resources(loaded.cluster))
    found = findings(Cluster(context), place)
    for one in found:
        console.print(f"{one.state:8} {one.text}", markup=False, highlight=False, soft_wrap=True)
        if one.fix and one.state != "ok":
            console.print(f"{'':8}   {one.fix}", markup=False, highlight=False, soft_wrap=True)
    missing = sum(one.state == "missing" for one in found)
    console.print(f"{missing} thing(s) missing" if missing else "ready", markup=False, highlight=False)
    return errors.EXIT_INPUT if missing else 0
