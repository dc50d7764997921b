"""The life of a RayJob on a real API server, with KubeRay's operator, Kueue, and real Ray heads of this machine.

The watcher is the real one, in a process of its own, with the token and the rights of a pipeline's service account; its
pod is an object in the API server, whose status is written here. So are the nodes of Ray's pods (`ray_node.py`).
"""

import json
import os
import subprocess
import sys
import threading
import time
import urllib.request

import pytest
import yaml

from components.runtime import ray_block, ray_files
from components.runtime.object_store import open_store
from components.runtime.ray_block import PodResources, RayBlock, RayWorkers
from components.runtime.ray_manifest import job_name
from tests.cluster.control_plane import wait_for
from tests.cluster.extensions import apply
from tests.cluster.permissions import events, granted, used
from tests.cluster.ray_node import RayNode
from tests.cluster.test_chart import CHART, DIGEST, ROOT, namespace, render

PLACE, TEAM, QUEUE = "rayjobs", "rayjobs-team", "training"
IMAGE = f"registry.example.com/sparseline-python@{DIGEST}"
KINDS = "rayjobs,rayclusters,pods,services,workloads,leases.coordination.k8s.io"
USER = f"system:serviceaccount:{TEAM}:pipeline-runner"
REAPER = f"system:serviceaccount:{PLACE}:sparseline-reaper"
STAGE = "example"
BODY = """
import json, sys, types
from components.runtime.stage import run_component
EXAMPLE = "tests.components.runtime.counting_stage"
out = types.SimpleNamespace(path=sys.argv[3] + "/count", metadata={})
summary = types.SimpleNamespace(path=sys.argv[3] + "/summary", metadata={})
run_component(sys.argv[1], sys.argv[2], 7, {}, {"count": out}, summary,
              run=EXAMPLE + ":run", config_class=EXAMPLE + ":Config")
print("outputs", json.dumps(out.metadata), json.dumps(summary.metadata), flush=True)
"""


def queues():
    """A queue with room for one of the example's RayJobs, in which a more important one takes the place of another."""
    group = {"apiVersion": "kueue.x-k8s.io/v1beta2"}
    quota = [{"name": name, "nominalQuota": amount} for name, amount in (("cpu", "3"), ("memory", "4Gi"))]
    flavor = {"coveredResources": ["cpu", "memory"], "flavors": [{"name": "any", "resources": quota}]}
    spec = {
        "namespaceSelector": {},
        "resourceGroups": [flavor],
        "preemption": {"withinClusterQueue": "LowerPriority"},
    }
    return [
        {**group, "kind": "ResourceFlavor", "metadata": {"name": "any"}},
        {**group, "kind": "ClusterQueue", "metadata": {"name": QUEUE}, "spec": spec},
        {
            **group,
            "kind": "LocalQueue",
            "metadata": {"name": QUEUE, "namespace": TEAM},
            "spec": {"clusterQueue": QUEUE},
        },
        {**group, "kind": "WorkloadPriorityClass", "metadata": {"name": "important"}, "value": 1000},
    ]


class Pod:
    """A task's pod: an object in the API server, and the watcher as a process that believes to be in it.

    Each test's `steps` are others: two stages that are to do the same go on from each other's training state.
    """

    def __init__(self, place, name, run_id, **config):
        self.place, self.name, self.run_id, self.config = place, name, run_id, config
        self.folder = place.folder / name
        self.folder.mkdir()
        self.log = self.folder / "log"
        values = {"SPARSELINE_STORE": place.store.uri, "SPARSELINE_RUNS": str(self.folder / "runs")}
        env = [{"name": key, "value": value} for key, value in values.items()]
        own_run = {"fieldPath": "metadata.labels['pipeline/runid']"}
        env += [
            {"name": "SPARSELINE_RUN_ID", "valueFrom": {"fieldRef": own_run}},
            {"name": "SPARSELINE_MIRRORED", "value": "1"},
            {"name": "AWS_SECRET_ACCESS_KEY", "valueFrom": {"secretKeyRef": {"name": "store", "key": "secretkey"}}},
            {"name": "KFP_RUN_ID", "value": "not passed on"},
        ]  # fmt: skip
        amounts = {"cpu": "100m", "memory": "128Mi"}
        container = {
            "name": "main",
            "image": IMAGE,
            "env": env,
            "resources": {"requests": amounts, "limits": amounts},
            "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        }
        spec = {
            "serviceAccountName": "pipeline-runner",
            "restartPolicy": "Never",
            "containers": [container],
            "securityContext": {"runAsNonRoot": True, "runAsUser": 10001, "seccompProfile": {"type": "RuntimeDefault"}},
        }
        metadata = {"name": name, "namespace": TEAM, "labels": {"pipeline/runid": run_id, "ray.io/cluster": "none"}}
        apply(place.cluster, [{"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}])
        self.uid = json.loads(place.kubectl("get", "pod", name, "-o", "json"))["metadata"]["uid"]
        self.phase("Running")
        self.process = self.start()

    def start(self):
        environment = {
            **os.environ,
            "KUBECONFIG": str(self.place.kubeconfig),
            "SPARSELINE_STORE": self.place.store.uri,
            "SPARSELINE_RUNS": str(self.folder / "runs"),
            "SPARSELINE_RUN_ID": self.run_id,
            ray_block.VARIABLE: self.place.block.model_dump_json(),
            ray_block.POD_NAME: self.name,
            ray_block.POD_UID: self.uid,
            ray_block.POD_NAMESPACE: TEAM,
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, "-u", "-c", BODY, STAGE, json.dumps(self.config), str(self.folder)]
        with self.log.open("ab") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)

    def phase(self, phase):
        status = json.dumps({"status": {"phase": phase}})
        self.place.kubectl("patch", "pod", self.name, "--subresource=status", "--type=merge", "--patch", status)

    def text(self):
        return self.log.read_text()

    def said(self, text, seconds=300.0):
        """Wait until the log has `text`."""

        def there():
            if text not in self.text() and self.process.poll() is not None:
                raise AssertionError(
                    f"the watcher ended with {self.process.returncode} without {text!r}:\n{self.text()}"
                )
            return text in self.text()

        try:
            wait_for(there, f"{text!r} in the log of {self.name}", seconds)
        except TimeoutError as error:
            raise AssertionError(f"{error}; its log:\n{self.text()}") from error

    def ended(self, code, seconds=300.0):
        assert self.process.wait(seconds) == code, self.text()

    def kill(self):
        """As a node does that kills a container: the process is gone, and then the pod has failed."""
        self.process.kill()
        self.process.wait()
        self.phase("Failed")


class Place:
    """A team's namespace with the chart's roles, a queue, and a store."""

    def __init__(self, cluster, folder):
        self.cluster, self.folder = cluster, folder
        self.store = open_store(str(folder / "store"))
        self.kubeconfig, self.reaper_kubeconfig = folder / "kubeconfig", folder / "reaper"
        small = {"cpu": "1", "memory": "1Gi"}
        workers = RayWorkers(workers=1, **small)
        self.block = RayBlock(head=PodResources(**small), workers=workers, queue=QUEUE, timeout=900)

    def kubectl(self, *arguments, **options):
        return self.cluster.kubectl(*arguments, f"--namespace={TEAM}", **options)

    def job(self, run_id):
        """The RayJob of a run, or None."""
        found = self.cluster.run(
            "get", "rayjob", job_name(run_id, STAGE), f"--namespace={TEAM}", "-o", "json", check=False
        )
        return json.loads(found.stdout) if found.returncode == 0 else None

    def left(self):
        """What Ray and Kueue have in the namespace, by kind and name."""
        found = json.loads(self.kubectl("get", KINDS, "-o", "json"))["items"]
        return sorted(
            f"{one['kind']}/{one['metadata']['name']}"
            for one in found
            if one["metadata"].get("labels", {}).get("ray.io/cluster") != "none"
        )

    def nothing_left(self, seconds=60.0):
        began = time.monotonic()
        wait_for(lambda: self.left() == [], "an empty namespace", seconds)
        return time.monotonic() - began

    def made(self, run_id):
        """How often the API server has made a RayJob for a run, by its audit log."""
        name, found = job_name(run_id, STAGE), events(self.cluster, USER)
        made = [one for one in found if one["verb"] == "create" and one["objectRef"]["resource"] == "rayjobs"]
        return [one["objectRef"].get("name") for one in made if one["responseStatus"]["code"] == 201].count(name)


@pytest.fixture(scope="module")
def place(own_cluster, kubelet, tmp_path_factory):
    cluster = own_cluster
    folder = tmp_path_factory.mktemp("rayjobs")
    values = yaml.safe_load((CHART / "ci/external.yaml").read_text())
    values["teams"] = [{"namespace": TEAM, "create": True}]
    values["distributed"] = {"enabled": True}
    (folder / "values.yaml").write_text(yaml.safe_dump(values))
    apply(cluster, [namespace(PLACE)])
    apply(cluster, render("--namespace", PLACE, "--values", folder / "values.yaml"))
    cluster.kubectl("create", "serviceaccount", "pipeline-runner", f"--namespace={TEAM}")
    cluster.kubectl("create", "secret", "generic", "store", "--from-literal=secretkey=x", f"--namespace={TEAM}")
    apply(cluster, queues())
    found = Place(cluster, folder)
    for path, account, where in (
        (found.kubeconfig, "pipeline-runner", TEAM),
        (found.reaper_kubeconfig, "sparseline-reaper", PLACE),
    ):
        token = cluster.kubectl("create", "token", account, f"--namespace={where}").strip()
        cluster.write_kubeconfig(path, token, where)
    found.node = RayNode(cluster, TEAM, {"SPARSELINE_MIRRORED": "1"})
    yield found
    found.node.stop()
    cluster.kubectl("delete", "namespace", PLACE, TEAM, "--wait=false")


@pytest.fixture
def reaper(place):
    """The reaper as the chart runs it, with shorter times."""
    log = (place.folder / "reaper.log").open("ab")
    command = [sys.executable, "-u", "-m", "components.runtime.ray_reaper", f"--namespace={TEAM}", "--interval=1"]
    command += ["--grace=8", "--silence=60"]
    environment = {**os.environ, "KUBECONFIG": str(place.reaper_kubeconfig)}
    process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    yield place.folder / "reaper.log"
    process.kill()
    process.wait()


def compact(cluster):
    """Drop etcd's whole history, so that whoever asks for an old revision is told 410."""

    def call(path, body):
        request = urllib.request.Request(f"{cluster.etcd}{path}", json.dumps(body).encode(), method="POST")
        return json.loads(urllib.request.urlopen(request, timeout=10).read())

    revision = call("/v3/maintenance/status", {})["header"]["revision"]
    call("/v3/kv/compaction", {"revision": revision, "physical": True})


def throttle(cluster):
    """The API server answers 429 to whatever the watcher's account asks."""
    group = {"apiVersion": "flowcontrol.apiserver.k8s.io/v1"}
    nothing = {"nominalConcurrencyShares": 0, "borrowingLimitPercent": 0, "limitResponse": {"type": "Reject"}}
    level = {"type": "Limited", "limited": nothing}
    account = {"kind": "ServiceAccount", "serviceAccount": {"name": "pipeline-runner", "namespace": TEAM}}
    everything = [{"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"], "namespaces": ["*"], "clusterScope": True}]
    rule = {"subjects": [account], "resourceRules": everything}
    spec = {"matchingPrecedence": 2, "priorityLevelConfiguration": {"name": "nothing"}, "rules": [rule]}
    made = [
        {**group, "kind": "PriorityLevelConfiguration", "metadata": {"name": "nothing"}, "spec": level},
        {**group, "kind": "FlowSchema", "metadata": {"name": "nothing"}, "spec": spec},
    ]
    apply(cluster, made)
    return made


class Crowd:
    """Others in the name of the watcher's account, all the time: a server without seats serves one at a time."""

    def __init__(self, place):
        self.end = threading.Event()
        self.threads = [threading.Thread(target=self._ask, args=(place,), daemon=True) for _ in range(8)]
        for one in self.threads:
            one.start()

    def _ask(self, place):
        path = f"/api/v1/namespaces/{TEAM}/pods/none"
        while not self.end.is_set():
            place.cluster.run("get", "--raw", path, check=False, kubeconfig=place.kubeconfig)

    def stop(self):
        self.end.set()
        for one in self.threads:
            one.join()


def throttled(cluster):
    """Whether the watcher itself, by its client, was told 429."""
    return any(
        event.get("responseStatus", {}).get("code") == 429 and event["userAgent"].startswith("OpenAPI-Generator")
        for event in events(cluster, USER)
    )


class Writer:
    """Another one who writes to the same RayJob, as fast as it can."""

    def __init__(self, place, run_id):
        self.end, self.count = threading.Event(), 0
        self.thread = threading.Thread(target=self._write, args=(place, job_name(run_id, STAGE)), daemon=True)
        self.thread.start()

    def _write(self, place, name):
        while not self.end.is_set():
            note = f"example={self.count}"
            arguments = ("annotate", "rayjob", name, note, "--overwrite", f"--namespace={TEAM}")
            self.count += place.cluster.run(*arguments, check=False).returncode == 0

    def stop(self):
        self.end.set()
        self.thread.join()


def test_one_rayjob_lives_through_a_killed_server_lost_history_other_writers_and_throttling(place):
    cluster = place.cluster
    pod = Pod(place, "storm", "run-storm", steps=90, seconds=0.5)
    pod.said("] step 2\n")
    writer = Writer(place, "run-storm")
    cluster.kill("apiserver")
    pod.said("the API server does not answer")
    time.sleep(3)
    cluster.start("apiserver")
    compact(cluster)
    made = throttle(cluster)
    crowd = Crowd(place)
    try:
        wait_for(lambda: throttled(cluster), "the watcher being throttled", 60)
    finally:
        crowd.stop()
    cluster.kubectl("delete", "--filename=-", input=yaml.safe_dump_all(made))
    pod.said("] step 90\n")
    pod.ended(0)
    writer.stop()
    told = pod.text()
    steps = [line.rsplit(" ", 1)[1] for line in told.splitlines() if "] step " in line]
    assert steps == [str(step) for step in range(1, 91)], told  # every line, once, in order
    assert "Ray is at" in told
    outputs, summary = (json.loads((pod.folder / name).read_text()) for name in ("count", "summary"))
    assert outputs["kind"] == "checkpoint"
    assert summary["summary"] == {"steps": 90, "resumed": 0}
    assert writer.count > 5
    place.nothing_left(30)
    assert place.made("run-storm") == 1
    assert place.store.keys(f"{ray_files.FOLDER}/") == []


def test_a_pod_in_place_of_a_killed_one_goes_on_watching_and_a_stop_leaves_nothing(place, reaper):
    first = Pod(place, "killed", "run-retry", steps=400, seconds=0.3)
    first.said("] step 2\n")
    before = place.job("run-retry")
    first.kill()
    second = Pod(place, "killed-retry", "run-retry", steps=400, seconds=0.3)
    second.said("is there already: goes on watching it")
    second.said("] step ")
    after = place.job("run-retry")
    assert after["metadata"]["uid"] == before["metadata"]["uid"]
    assert [one["uid"] for one in after["metadata"]["ownerReferences"]] == [second.uid]
    time.sleep(12)  # longer than the reaper's grace: what is watched again stays
    assert place.job("run-retry")["metadata"]["uid"] == before["metadata"]["uid"]
    second.process.terminate()
    second.ended(130, 40)
    assert place.nothing_left() < 60
    assert place.made("run-retry") == 1
    assert "deleted" not in reaper.read_text()


def test_nothing_stays_when_the_watcher_is_killed_and_nobody_follows(place, reaper):
    pod = Pod(place, "lost", "run-lost", steps=401, seconds=0.3)
    pod.said("] step 2\n")
    pod.kill()
    seconds = place.nothing_left(60)
    assert seconds < 60
    assert f"deleted RayJob {TEAM}/{job_name('run-lost', STAGE)}: its watcher is gone" in reaper.read_text()
    assert place.made("run-lost") == 1


def test_nothing_stays_when_the_watcher_s_pod_is_deleted(place):
    pod = Pod(place, "deleted", "run-deleted", steps=402, seconds=0.3)
    pod.said("] step 1\n")
    pod.process.kill()
    pod.process.wait()
    place.kubectl("delete", "pod", pod.name, "--wait=false")  # as with its run: Kubernetes removes what belonged to it
    assert place.nothing_left(60) < 60


def important():
    """A more important RayJob of somebody else, which takes all of the queue."""
    amounts = {"cpu": "3", "memory": "1Gi"}
    container = {"name": "ray-head", "image": IMAGE, "resources": {"requests": amounts, "limits": amounts}}
    labels = {"kueue.x-k8s.io/queue-name": QUEUE, "kueue.x-k8s.io/priority-class": "important"}
    security = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}, "runAsNonRoot": True}
    container["securityContext"] = {**security, "seccompProfile": {"type": "RuntimeDefault"}}
    head = {"rayStartParams": {}, "template": {"spec": {"containers": [container]}}}
    spec = {"entrypoint": "true", "submissionMode": "HTTPMode", "shutdownAfterJobFinishes": True}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": "important", "namespace": TEAM, "labels": labels},
        "spec": {**spec, "rayClusterSpec": {"headGroupSpec": head}},
    }


def test_a_preempted_stage_waits_in_the_queue_and_goes_on_where_it_was(place):
    pod = Pod(place, "preempted", "run-preempted", steps=60, seconds=0.5)
    pod.said("] step 3\n")
    place.node.idle = True  # the other one's pods stay pending: they only take the quota
    apply(place.cluster, [important()])
    pod.said("once admitted again, the stage goes on from its last state")
    wait_for(lambda: not place.node.heads, "the preempted head to end", 60)
    place.kubectl("delete", "rayjob", "important", "--wait=false")
    place.node.idle = False
    pod.said("goes on after step", 180)
    pod.said("] step 60\n", 120)
    pod.ended(0)
    resumed = json.loads((pod.folder / "summary").read_text())["summary"]["resumed"]
    before, after = (
        [int(line.rsplit(" ", 1)[1]) for line in part.splitlines() if "] step " in line]
        for part in pod.text().split("goes on after step")
    )
    # The pod is killed at once here: what it said in the last seconds is lost, what it did is not.
    assert before == list(range(1, len(before) + 1))
    assert 3 <= len(before) <= resumed
    assert after == list(range(resumed + 1, 61))
    assert place.made("run-preempted") == 1
    place.nothing_left(30)


def test_bad_input_of_the_stage_is_told_by_its_task(place):
    pod = Pod(place, "refused", "run-refused", refuse=True)
    pod.ended(2, 180)
    assert pod.text().splitlines()[-1] == f"{STAGE}: these inputs are refused: give others"
    place.nothing_left(30)


def test_what_is_granted_is_used_and_nothing_else_is_asked_for(place):
    """After the tests above: the audit log of a watcher's account and of the reaper's."""
    assert used(place.cluster, USER) == granted(place.cluster, TEAM, "sparseline-distributed")
    assert used(place.cluster, REAPER) == granted(place.cluster, TEAM, "sparseline-reaper")
    for account in (USER, REAPER):
        assert used(place.cluster, account, decision="forbid") == set()


def test_a_team_without_the_chart_s_roles_is_told_what_to_set(place):
    role = place.kubectl("get", "rolebinding", "sparseline-distributed", "-o", "yaml")
    place.kubectl("delete", "rolebinding", "sparseline-distributed")
    try:
        pod = Pod(place, "unbound", "run-unbound")
        pod.ended(2, 60)
        assert "may not get pods" in pod.text()
        assert "distributed.enabled: true" in pod.text()
    finally:
        place.kubectl("create", "--filename=-", input=role)
