"""The chart's value sets and the overlays on a real API server: strictly valid, `restricted`, idempotent."""

import subprocess
from pathlib import Path

import pytest
import yaml

from tests.cluster.extensions import apply, built
from tests.manifests import tools

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts" / "sparseline"
VALUES = sorted((CHART / "ci").glob("*.yaml"))
DIGEST = "sha256:" + "0123456789abcdef" * 4
RESTRICTED = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn")}
WORKLOADS = {"Deployment", "StatefulSet"}


def namespace(name):
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": RESTRICTED}}


def helm(*arguments, kubeconfig=None):
    command = [str(tools.tool("helm", build=True)), *map(str, arguments)]
    if kubeconfig:
        command += ["--kubeconfig", str(kubeconfig)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def render(*arguments):
    return [one for one in yaml.safe_load_all(helm("template", "sparseline", CHART, *arguments)) if one]


def applied_twice(cluster, wanted):
    """Apply, apply again, and see that the second changed nothing."""
    first = apply(cluster, wanted)
    assert "Warning" not in first, first
    before = generations(cluster, wanted)
    apply(cluster, wanted)
    difference = cluster.run("diff", "--server-side", "--filename=-", input=yaml.safe_dump_all(wanted), check=False)
    assert difference.returncode == 0, difference.stdout + difference.stderr
    assert generations(cluster, wanted) == before


def generations(cluster, wanted):
    found = cluster.kubectl("get", "--filename=-", "--output=yaml", input=yaml.safe_dump_all(wanted))
    items = yaml.safe_load(found)["items"]
    assert len(items) == len(wanted)
    return {
        (one["kind"], one["metadata"].get("namespace"), one["metadata"]["name"]): (
            one["metadata"]["uid"],
            one["metadata"].get("generation"),
        )
        for one in items
    }


def priorities(wanted):
    """The priority classes that a cluster's operator has made for these workloads."""
    pods = [one["spec"]["template"]["spec"] for one in wanted if one["kind"] in WORKLOADS]
    return [
        {"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": {"name": name}, "value": 1000}
        for name in sorted({pod["priorityClassName"] for pod in pods if pod.get("priorityClassName")})
    ]


def available(cluster, wanted):
    """Every workload's pods were admitted, and (played) run; every job ended."""
    for one in wanted:
        place = f"--namespace={one['metadata'].get('namespace', '')}"
        name = f"{one['kind'].lower()}/{one['metadata']['name']}"
        if one["kind"] in WORKLOADS:
            cluster.kubectl("rollout", "status", name, place, "--timeout=60s")
        elif one["kind"] == "Job":
            cluster.kubectl("wait", name, place, "--for=condition=Complete", "--timeout=60s")


@pytest.mark.parametrize("path", VALUES, ids=lambda path: path.stem)
def test_a_value_set_is_accepted_and_the_second_time_changes_nothing(cluster, kubelet, path):
    place = f"values-{path.stem}"
    wanted = render("--namespace", place, "--values", path)
    made = {one["metadata"]["name"] for one in wanted if one["kind"] == "Namespace"}
    namespaces = {place, *(one["metadata"]["namespace"] for one in wanted if "namespace" in one["metadata"])}
    apply(cluster, [namespace(name) for name in sorted(namespaces - made)] + priorities(wanted))
    try:
        applied_twice(cluster, wanted)
        available(cluster, wanted)
    finally:
        cluster.kubectl("delete", "namespace", place, "--wait=false")
        if namespaces != {place}:  # teams of these names are in other value sets too
            cluster.kubectl("delete", "namespace", *sorted(namespaces - {place}))


@pytest.mark.parametrize("environment", ["dev", "staging", "prod"])
def test_an_overlay_is_accepted_and_the_second_time_changes_nothing(cluster, kubelet, environment):
    own = built(ROOT / f"manifests/overlays/{environment}")
    values = ROOT / "manifests" / "overlays" / environment / "values.yaml"
    pins = ["--set", f"image.digest={DIGEST}"]
    if environment == "dev":
        pins += ["--set", f"objectStore.image.digest={DIGEST}"]
    chart = render("--namespace", "sparseline", "--values", values, *pins)
    made = {one["metadata"]["name"] for one in own + chart if one["kind"] == "Namespace"}
    others = {one["metadata"]["namespace"] for one in own + chart if "namespace" in one["metadata"]} - made
    try:
        apply(cluster, [namespace(name) for name in sorted(others)])
        applied_twice(cluster, own)
        applied_twice(cluster, chart)
        available(cluster, chart)
    finally:
        cluster.kubectl("delete", "namespace", "--ignore-not-found", *sorted(made | others))


@pytest.mark.parametrize("environment", ["dev", "staging", "prod"])
def test_argo_cd_s_applications_are_accepted(cluster, environment):
    apply(cluster, [namespace("argocd")])
    applied_twice(cluster, built(ROOT / f"manifests/argocd/overlays/{environment}"))


def test_the_pipelines_are_accepted(cluster):
    apply(cluster, [namespace("pipelines")])
    wanted = built(ROOT / "manifests/pipelines")
    for one in wanted:
        one["metadata"]["namespace"] = "pipelines"
    applied_twice(cluster, wanted)


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda one: one["spec"].update(replica=2), r"spec\.replica: field not declared"),
        (lambda one: one["spec"].update(replicas="two"), "replicas"),
    ],
)
def test_a_mistake_is_refused(cluster, change, told):
    """The strictness above is real."""
    apply(cluster, [namespace("mistakes")])
    (server,) = [
        one
        for one in render("--namespace", "mistakes", "--values", CHART / "ci/external.yaml")
        if one["kind"] == "Deployment"
    ]
    change(server)
    with pytest.raises(RuntimeError, match=told):
        apply(cluster, [server])


def test_a_pod_that_is_not_restricted_is_warned_of_and_not_admitted(cluster, kubelet):
    """What `available` above relies on."""
    apply(cluster, [namespace("unsafe")])
    (server,) = [
        one
        for one in render("--namespace", "unsafe", "--values", CHART / "ci/external.yaml")
        if one["kind"] == "Deployment"
    ]
    server["spec"]["template"]["spec"]["containers"][0]["securityContext"]["allowPrivilegeEscalation"] = True
    assert "would violate PodSecurity" in apply(cluster, [server])
    with pytest.raises(RuntimeError, match=r"timed out|exceeded"):
        cluster.kubectl("rollout", "status", "deployment", "--namespace=unsafe", "--timeout=3s")
    assert cluster.kubectl("get", "pods", "--namespace=unsafe", "--output=name") == ""
