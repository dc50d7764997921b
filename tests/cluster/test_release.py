"""The chart from one version to the next and back, on a real API server: what is kept, what an old release becomes."""

import base64
import gzip
import json
from pathlib import Path

import pytest
import yaml

from tests.cluster.extensions import apply
from tests.cluster.test_chart import CHART, helm, namespace

PREVIOUS = Path(__file__).resolve().parent / "previous" / "sparseline-0.1.0.tgz"
VALUES = CHART / "ci" / "seaweedfs.yaml"
PLACE = "releases"


@pytest.fixture(scope="module")
def place(cluster, kubelet):
    apply(cluster, [namespace(PLACE)])
    secret = {"accesskey": "test", "secretkey": "test-secret"}
    metadata = {"name": "sparseline-store", "namespace": PLACE}
    apply(cluster, [{"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": secret}])
    apply(cluster, [volume(f"{PLACE}-{index}") for index in range(2)])
    yield PLACE
    cluster.kubectl("delete", "namespace", PLACE)
    cluster.kubectl("delete", "persistentvolume", *(f"{PLACE}-{index}" for index in range(2)), "--wait=false")


def volume(name):
    """What a storage class would make for a claim; nothing is ever written there."""
    spec = {
        "capacity": {"storage": "100Gi"},
        "accessModes": ["ReadWriteOnce"],
        "hostPath": {"path": f"/nowhere/{name}"},
    }
    return {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": name}, "spec": spec}


def claims(cluster):
    found = json.loads(cluster.kubectl("get", "pvc", f"--namespace={PLACE}", "--output=json"))["items"]
    return {one["metadata"]["name"]: one["metadata"]["uid"] for one in found}


def chart_of(cluster, name):
    found = cluster.kubectl("get", "deployment", name, f"--namespace={PLACE}", "--output=yaml")
    return yaml.safe_load(found)["metadata"]["labels"]["helm.sh/chart"]


def manifest(cluster, revision):
    """What Helm recorded as applied for this revision."""
    name = f"sh.helm.release.v1.sparseline.v{revision}"
    secret = json.loads(cluster.kubectl("get", "secret", name, f"--namespace={PLACE}", "--output=json"))
    packed = base64.b64decode(base64.b64decode(secret["data"]["release"]))
    return json.loads(gzip.decompress(packed))["manifest"]


def live(cluster, text):
    """Every object of a manifest as it is now, without what the server keeps of it."""
    found = yaml.safe_load(cluster.kubectl("get", "--filename=-", "--output=yaml", f"--namespace={PLACE}", input=text))
    return {(one["kind"], one["metadata"]["name"]): one.get("spec", one.get("data")) for one in found["items"]}


def test_upgrade_rollback_and_uninstall_keep_the_volumes(cluster, place):
    values = yaml.safe_load(VALUES.read_text())
    values.pop("backup")  # the previous chart had none, and its schema refuses the key
    old = cluster.directory / "old.yaml"
    old.write_text(yaml.safe_dump(values))

    def release(*arguments):
        wait = ("--wait",) if arguments[0] != "test" else ()
        return helm(*arguments, "--namespace", place, "--timeout=120s", *wait, kubeconfig=cluster.kubeconfig)

    release("install", "sparseline", PREVIOUS, "--values", old)
    assert chart_of(cluster, "sparseline-mlflow") == "sparseline-0.1.0"
    kept, first = claims(cluster), live(cluster, manifest(cluster, 1))
    assert len(kept) == 2  # MLflow's and the store's

    release("upgrade", "sparseline", CHART, "--values", VALUES)
    now = yaml.safe_load((CHART / "Chart.yaml").read_text())["version"]
    assert chart_of(cluster, "sparseline-mlflow") == f"sparseline-{now}" != "sparseline-0.1.0"
    assert claims(cluster) == kept
    assert cluster.kubectl("get", "cronjob", f"--namespace={place}", "--output=name").strip()

    release("rollback", "sparseline", "1")
    assert chart_of(cluster, "sparseline-mlflow") == "sparseline-0.1.0"
    assert live(cluster, manifest(cluster, 1)) == first
    assert claims(cluster) == kept
    assert cluster.kubectl("get", "cronjob", f"--namespace={place}", "--output=name") == ""

    release("uninstall", "sparseline")
    assert claims(cluster) == kept
    left = cluster.kubectl("get", "deployment,service,job", f"--namespace={place}", "--output=name")
    assert left == ""

    release("install", "sparseline", CHART, "--values", VALUES)  # takes up the volumes that were left
    assert claims(cluster) == kept
    release("test", "sparseline")
    release("uninstall", "sparseline")


def test_an_upgrade_whose_hook_fails_leaves_the_old_release_serving(cluster, place, kubelet, monkeypatch):
    """The job that verifies a pinned version fails: what served before is not touched."""
    base = ("--values", CHART / "ci/external.yaml", "--set", "serving.enabled=true")
    arguments = ("--namespace", place, "--wait", "--timeout=60s")
    helm("install", "sparseline", CHART, *base, *arguments, kubeconfig=cluster.kubeconfig)
    before = cluster.kubectl("get", "deployment", f"--namespace={place}", "--output=yaml")
    monkeypatch.setattr(kubelet, "exit_code", 1)
    pin = ("--set", "serving.version=7", "--set", f"serving.digest={'0123456789abcdef' * 4}")
    with pytest.raises(AssertionError, match="pre-upgrade hooks failed"):
        helm("upgrade", "sparseline", CHART, *base, *pin, *arguments, kubeconfig=cluster.kubeconfig)
    after = cluster.kubectl("get", "deployment", f"--namespace={place}", "--output=yaml")
    assert [one["spec"] for one in yaml.safe_load(after)["items"]] == [
        one["spec"] for one in yaml.safe_load(before)["items"]
    ]
    monkeypatch.setattr(kubelet, "exit_code", 0)
    helm("upgrade", "sparseline", CHART, *base, *pin, *arguments, kubeconfig=cluster.kubeconfig)
    server = cluster.kubectl("get", "deployment", "sparseline-serving", f"--namespace={place}", "--output=yaml")
    assert "--model=models:/sparseline-nano/7" in server
    helm("uninstall", "sparseline", "--namespace", place, kubeconfig=cluster.kubeconfig)
