"""Chart, overlays and compiled pipelines as Helm and Kustomize render them: schemas, policy, drift, bad input.

`make check-manifests` builds the tools once and runs this alone. Without them, what needs them is skipped.
"""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

HERE, ROOT = Path(__file__).resolve().parent, Path(__file__).resolve().parents[2]


def load(name):
    specification = importlib.util.spec_from_file_location(f"manifest_{name}", HERE / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


checks, tools = load("checks"), load("tools")
CHART = ROOT / "charts" / "sparseline"
VALUES = sorted((CHART / "ci").glob("*.yaml"))
ENVIRONMENTS = ("dev", "staging", "prod")
TEST_DIGEST = "sha256:" + "0123456789abcdef" * 4
KUSTOMIZATIONS = [
    *(f"manifests/overlays/{one}" for one in ENVIRONMENTS),
    *(f"manifests/argocd/overlays/{one}" for one in ENVIRONMENTS),
    "manifests/argocd/health",
    "manifests/pipelines",
    "tests/manifests/kfp",
]


def run(name, *arguments):
    try:
        program = tools.tool(name)
    except tools.Unavailable as reason:
        pytest.skip(str(reason))
    return subprocess.run([str(program), *map(str, arguments)], capture_output=True, text=True, timeout=120)


def template(*arguments):
    return run("helm", "template", "sparseline", CHART, "--namespace", "sparseline", *arguments)


def rendered(*arguments):
    done = template(*arguments)
    assert done.returncode == 0, done.stderr
    return manifests(done.stdout)


def manifests(text):
    return [one for one in yaml.safe_load_all(text) if one]


def build(folder):
    done = run("kustomize", "build", ROOT / folder)
    assert done.returncode == 0, done.stderr
    return manifests(done.stdout)


def overlay(environment, *arguments):
    """The chart with an overlay's values, its image pinned as a release would be."""
    values = ROOT / "manifests" / "overlays" / environment / "values.yaml"
    return rendered("--values", values, "--set", f"image.digest={TEST_DIGEST}", *arguments)


def complaints(found, policies=checks.POLICIES):
    told = [one for version in checks.VERSIONS for one in checks.schema(found, version)]
    return told + [one for manifest in found for policy in policies for one in policy(manifest)]


def test_there_are_value_sets_enough():
    assert len(VALUES) >= 8


@pytest.mark.parametrize("path", VALUES, ids=lambda path: path.stem)
def test_a_value_set_is_valid_and_safe(path):
    found = rendered("--values", path)
    assert len(found) > 8
    assert complaints(found) == []
    keys = [(one["kind"], one["metadata"].get("namespace"), one["metadata"]["name"]) for one in found]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_an_overlay_s_release_is_valid_and_safe(environment):
    store = ["--set", f"objectStore.image.digest={TEST_DIGEST}"] if environment == "dev" else []
    assert complaints(overlay(environment, *store)) == []


@pytest.mark.parametrize("environment", ["staging", "prod"])
def test_an_image_without_digest_is_refused_where_it_counts(environment):
    values = ROOT / "manifests" / "overlays" / environment / "values.yaml"
    pinned = yaml.safe_load(values.read_text())["image"]["digest"]
    done = template("--values", values, "--set", "image.digest=")
    assert done.returncode != 0
    assert "image.requireDigest is true" in done.stderr
    assert pinned == "" or pinned.startswith("sha256:")


def test_production_serves_a_pinned_version():
    version = yaml.safe_load((ROOT / "manifests/overlays/prod/values.yaml").read_text())["serving"]["version"]
    assert isinstance(version, int)
    (server,) = [
        one
        for one in overlay("prod")
        if one["metadata"]["name"] == "sparseline-serving" and one["kind"] == "Deployment"
    ]
    assert f"--model=models:/sparseline-nano/{version}" in server["spec"]["template"]["spec"]["containers"][0]["args"]


def test_a_backup_runs_beside_mlflow_with_credentials_of_its_own():
    found = rendered("--values", CHART / "ci/postgresql.yaml")
    (job,) = [one for one in found if one["kind"] == "CronJob"]
    assert job["spec"]["concurrencyPolicy"] == "Forbid"
    pod = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert "affinity" not in pod  # its volume can be read from any node
    variables = {one["name"]: one for one in pod["containers"][0]["env"]}
    assert variables["SPARSELINE_DATABASE"]["valueFrom"]["secretKeyRef"]["name"] == "mlflow-database"
    assert variables["SPARSELINE_BACKUP_ACCESS_KEY_ID"]["valueFrom"]["secretKeyRef"]["name"] == "backup-store"
    (policy,) = [one for one in found if one["kind"] == "NetworkPolicy" and one["metadata"]["name"].endswith("-backup")]
    assert [port["port"] for rule in policy["spec"]["egress"] for port in rule["ports"]] == [9443, 8888, 53, 53]
    (job,) = [one for one in rendered("--values", CHART / "ci/seaweedfs.yaml") if one["kind"] == "CronJob"]
    pod = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    (term,) = pod["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert term["labelSelector"]["matchLabels"]["app.kubernetes.io/component"] == "mlflow"
    assert {"name": "SPARSELINE_DATABASE", "value": "sqlite:////data/mlflow.db"} in pod["containers"][0]["env"]


def one_of(found, kind, name):
    (manifest,) = [one for one in found if one["kind"] == kind and one["metadata"]["name"] == f"sparseline-{name}"]
    return manifest


def ports(policy, direction):
    return [port["port"] for rule in policy["spec"][direction] for port in rule["ports"]]


def test_a_passed_gate_opens_a_commit():
    found = rendered("--values", CHART / "ci/release.yaml")
    job = one_of(found, "CronJob", "release")["spec"]
    assert (job["concurrencyPolicy"], job["schedule"]) == ("Forbid", "*/5 * * * *")
    (container,) = job["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    assert container["args"] == [
        "clusters/prod/values.yaml",
        "--repository=https://git.example.com:8443/platform",
        "--base=production",
        "--name=sparseline-agent",
        "--sample=32",
        "--commit",
    ]
    variables = {one["name"]: one for one in container["env"]}
    for name, key in (("SPARSELINE_GIT_USERNAME", "username"), ("SPARSELINE_GIT_PASSWORD", "password")):
        assert variables[name]["valueFrom"]["secretKeyRef"] == {"name": "sparseline-git", "key": key}
    assert variables["https_proxy"]["value"] == "http://proxy.example.com:3128"
    policy = one_of(found, "NetworkPolicy", "release")
    assert policy["spec"]["egress"][0]["to"] == [{"ipBlock": {"cidr": "10.30.0.0/16"}}]
    assert ports(policy, "egress") == [8443, 3128, 53, 53]
    (values,) = one_of(found, "NetworkPolicy", "programs")["spec"]["podSelector"]["matchExpressions"][1:]
    assert "release" in values["values"]  # it calls the store and MLflow


def test_a_release_is_only_shown_unless_it_is_to_be_pushed():
    found = rendered("--values", CHART / "ci/release.yaml", "--set", "release.commit=false,release.existingSecret=")
    job = one_of(found, "CronJob", "release")["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert "--commit" not in job["containers"][0]["args"]
    assert not any(one["name"].startswith("SPARSELINE_GIT") for one in job["containers"][0]["env"])
    assert not [one for one in overlay("prod") if one["kind"] == "CronJob"]


def test_the_arguments_in_the_chart_are_those_of_the_programs():
    """The programs read them themselves: what they do not know they refuse by exit code 2."""
    release = one_of(rendered("--values", CHART / "ci/release.yaml"), "CronJob", "release")["spec"]["jobTemplate"]
    observer = one_of(rendered("--values", CHART / "ci/observed.yaml"), "Deployment", "observer")
    for manifest in (release, observer):
        (container,) = manifest["spec"]["template"]["spec"]["containers"]
        command = [sys.executable, *container["command"][1:], *container["args"], "--help"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        known = set(re.findall(r"--[a-z][a-z-]+", done.stdout))
        assert {one.split("=")[0] for one in container["args"] if one.startswith("--")} <= known


def test_the_observer_is_asked_by_prometheus_and_asks_kubeflow_pipelines_alone():
    found = rendered("--values", CHART / "ci/observed.yaml")
    deployment, service = one_of(found, "Deployment", "observer"), one_of(found, "Service", "observer")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert "--endpoint=http://ml-pipeline.pipelines.svc:8888" in container["args"]
    assert "--time-zone=Europe/Berlin" in container["args"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    monitor = one_of(found, "ServiceMonitor", "observer")
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert monitor["spec"]["endpoints"][0]["port"] == service["spec"]["ports"][0]["name"]
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    policy = one_of(found, "NetworkPolicy", "observer")["spec"]
    names = [
        peer["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]
        for rule in (*policy["ingress"], *policy["egress"])
        for peer in (*rule.get("from", []), *rule.get("to", []))
    ]
    assert names == ["observability", "pipelines", "kube-system"]
    assert ports({"spec": policy}, "ingress") == [9465]
    assert ports({"spec": policy}, "egress") == [8888, 53, 53]


# Of kube-state-metrics and the kubelet.
OTHERS = {
    "kube_cronjob_created",
    "kube_cronjob_status_last_successful_time",
    "kube_deployment_status_replicas_available",
    "kube_pod_container_resource_requests",
    "kube_pod_status_phase",
    "kubelet_volume_stats_available_bytes",
    "kubelet_volume_stats_capacity_bytes",
}


def exposed():
    """The names of the metrics that our own programs expose, as a scrape gives them."""
    from prometheus_client import CollectorRegistry, generate_latest

    from components.serving.metrics import Metrics
    from pipelines.observer import Facts, Observer, Schedule

    observer, registry = Observer(), CollectorRegistry()
    observer.facts = Facts((Schedule("s", "r", 1.0, 1.0, 0, 1),), {"p": 0})
    registry.register(observer)
    texts = [Metrics("m").text(), generate_latest(registry)]
    return {re.split(r"[{ ]", line)[0] for text in texts for line in text.decode().splitlines() if line[:1] != "#"}


def metrics_in(expression):
    return set(re.findall(r"\b(?:sparseline|kube|kubelet)_[a-z0-9_]+", expression))


def expressions():
    """(where, expression) of each alert, panel and autoscaler, with everything switched on."""
    found = [one for path in VALUES for one in rendered("--values", path)]
    for one in found:
        for group in one["spec"]["groups"] if one["kind"] == "PrometheusRule" else []:
            yield from ((rule["alert"], rule["expr"]) for rule in group["rules"])
        if one["kind"] == "HorizontalPodAutoscaler":
            yield from (
                ("autoscaler", metric["pods"]["metric"]["name"])
                for metric in one["spec"]["metrics"]
                if "pods" in metric
            )
    dashboard = json.loads((CHART / "dashboards/sparseline.json").read_text())
    for panel in dashboard["panels"]:
        yield from ((panel["title"], target["expr"]) for target in panel["targets"])
    yield from ((one["name"], one["query"]) for one in dashboard["templating"]["list"])


def unknown_metrics(expression):
    return metrics_in(expression) - exposed() - OTHERS


def test_alerts_and_panels_name_metrics_that_are_exposed():
    found = list(expressions())
    assert {"SparselineScheduleMissed", "SparselineGateRejectedTwice", "autoscaler"} <= {where for where, _ in found}
    assert [(where, unknown_metrics(one)) for where, one in found if unknown_metrics(one)] == []


def test_a_metric_that_nobody_exposes_is_found():
    assert unknown_metrics("rate(sparseline_request_total[5m]) > sparseline_requests_total") == {
        "sparseline_requests_total"
    }


def test_an_alert_says_what_to_do():
    for one in rendered("--values", CHART / "ci/observed.yaml"):
        for group in one["spec"]["groups"] if one["kind"] == "PrometheusRule" else []:
            for rule in group["rules"]:
                assert set(rule["annotations"]) == {"summary", "action"}, rule["alert"]


def test_without_the_observer_nothing_waits_for_its_metrics():
    found = rendered("--values", CHART / "ci/observed.yaml", "--set", "monitoring.observer.enabled=false")
    (rules,) = [one for one in found if one["kind"] == "PrometheusRule"]
    assert "sparseline_kfp" not in json.dumps(rules)
    assert not [one for one in found if one["metadata"]["name"].endswith("-observer")]


WAVE = "argocd.argoproj.io/sync-wave"


def test_a_pinned_version_is_verified_before_it_is_served():
    digest = "0123456789abcdef" * 4
    found = {
        (one["kind"], one["metadata"]["name"]): one for one in overlay("prod", "--set", f"serving.digest={digest}")
    }
    job, server = found["Job", "sparseline-serving-verify"], found["Deployment", "sparseline-serving"]
    waves = {name: int(one["metadata"].get("annotations", {}).get(WAVE, 0)) for name, one in found.items()}
    # A failed hook ends the sync before the waves behind it: the server is not touched.
    assert job["metadata"]["annotations"]["argocd.argoproj.io/hook"] == "Sync"
    before = waves["Deployment", "sparseline-mlflow"], waves["Job", "sparseline-serving-verify"]
    assert before[0] < before[1] < waves["Deployment", "sparseline-serving"]
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["args"] == ["1", "--name=sparseline-nano", "--sample=32", f"--digest={digest}"]
    assert f"--digest={digest}" in server["spec"]["template"]["spec"]["containers"][0]["args"]
    component = job["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/component"]
    selected = [
        expression["values"]
        for (kind, _), one in found.items()
        if kind == "NetworkPolicy"
        for expression in one["spec"]["podSelector"].get("matchExpressions", [])
    ]
    assert any(component in values for values in selected)


@pytest.mark.parametrize("without", ["serving.version=champion", "serving.verify.enabled=false"])
def test_what_is_not_pinned_or_not_wanted_is_not_verified(without):
    assert not [one for one in overlay("prod", "--set", without) if one["metadata"]["name"].endswith("-serving-verify")]


@pytest.mark.parametrize("folder", KUSTOMIZATIONS)
def test_a_kustomization_is_valid_and_safe(folder):
    found = build(folder)
    assert found
    # KFP's own deployment in tests/manifests/kfp is not ours to judge.
    policies = (checks.plain_secrets,) if folder.startswith("tests/") else checks.POLICIES
    assert complaints(found, policies) == []


def test_every_application_s_path_is_in_the_repository():
    found = build("manifests/argocd/overlays/prod")
    url = "https://git.example.com/sparseline.git"
    sources = [
        source
        for one in found
        if one["kind"] == "Application"
        for source in one["spec"].get("sources", [one["spec"].get("source")])
    ]
    ours = [source for source in sources if source["repoURL"] == url]
    assert len(ours) == 4
    for source in ours:
        assert (ROOT / source["path"]).is_dir(), source
        for values in source.get("helm", {}).get("valueFiles", []):
            assert (ROOT / source["path"] / values).resolve().is_file(), values
    assert "repository" not in {source["repoURL"] for source in sources}
    assert "ENVIRONMENT" not in json.dumps(found)
    waves = {
        one["metadata"]["name"]: int(one["metadata"]["annotations"]["argocd.argoproj.io/sync-wave"])
        for one in found
        if one["kind"] == "Application"
    }
    assert waves["cert-manager"] < waves["sparseline-kfp"] < waves["sparseline"] < waves["sparseline-pipelines"]
    assert waves["kuberay"] < waves["sparseline"]
    assert waves["kueue"] < waves["sparseline"]


def test_the_mlflow_plugin_is_added_to_kfp_s_configuration():
    found = build("tests/manifests/kfp")
    (configuration,) = [one for one in found if one["kind"] == "ConfigMap"]
    (deployment,) = [one for one in found if one["kind"] == "Deployment"]
    plugin = json.loads(configuration["data"]["config.json"])["plugins"]["mlflow"]
    services = {
        f"http://{one['metadata']['name']}.sparseline.svc:5000" for one in overlay("prod") if one["kind"] == "Service"
    }
    assert plugin["endpoint"] in services
    assert plugin["settings"]["injectUserEnvVars"] is True
    pod = deployment["spec"]["template"]["spec"]
    assert pod["volumes"][-1]["configMap"]["name"] == configuration["metadata"]["name"]
    assert pod["containers"][0]["image"]  # the patch met the container that is there, and added none
    assert len(pod["containers"]) == 1


def test_the_compiled_pipelines_are_those_of_the_sources(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pipelines.cli", "compile", "--all", "--output", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=120,
    )
    compare = load_drift()
    assert compare(ROOT / "manifests/pipelines", tmp_path) == [], (
        "write them again: sparseline compile --all --output manifests/pipelines"
    )
    (tmp_path / "training/nano/pipeline.yaml").write_text(
        (tmp_path / "training/nano/pipeline.yaml").read_text() + "# changed\n"
    )
    (tmp_path / "retraining/micro/resources.yaml").unlink()
    assert compare(ROOT / "manifests/pipelines", tmp_path) == [
        "retraining/micro/resources.yaml",
        "training/nano/pipeline.yaml",
    ]


def load_drift():
    from pipelines.cluster import without_versions

    def compare(one, other):
        paths = {path.relative_to(folder) for folder in (one, other) for path in folder.rglob("*.yaml")}
        read = lambda path: without_versions(path.read_text()) if path.is_file() else None  # noqa: E731
        return sorted(str(path) for path in paths if read(one / path) != read(other / path))

    return compare


def test_each_task_of_a_compiled_pipeline_is_as_a_restricted_namespace_wants_it():
    from pipelines import catalogue, profiles

    found = {"/".join(path.parts[-3:-1]) for path in (ROOT / "manifests/pipelines").glob("*/*/pipeline.yaml")}
    assert found == {f"{pipeline}/{profile}" for pipeline in catalogue.PIPELINES for profile in profiles.names()}
    for path in (ROOT / "manifests/pipelines").glob("*/*/pipeline.yaml"):
        specification, platform = yaml.safe_load_all(path.read_text())
        executors = specification["deploymentSpec"]["executors"]
        cluster = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
        assert set(executors) == set(cluster)
        assert len(executors) == len(catalogue.PIPELINES[path.parts[-3]].stages)
        for name, executor in executors.items():
            resources = executor["container"]["resources"]
            assert {"resourceCpuLimit", "resourceMemoryLimit", "resourceCpuRequest", "resourceMemoryRequest"} <= set(
                resources
            ), name
            assert cluster[name]["securityContext"]["runAsNonRoot"] is True
            assert int(cluster[name]["securityContext"]["runAsUser"]) > 0
            assert int(cluster[name]["activeDeadlineSeconds"]) > 0
            assert {"envVar": "AWS_SECRET_ACCESS_KEY", "secretKey": "secretkey"} in cluster[name]["secretAsEnv"][0][
                "keyToEnv"
            ]


def rayjob(**block):
    """The RayJob that a task of a compiled pipeline makes, its own pod as Argo and KFP's MLflow plugin leave it."""
    from components.runtime.ray_block import RayBlock
    from components.runtime.ray_manifest import Watcher, ray_job

    def of(source, **about):
        return {"valueFrom": {source: about}}

    env = [
        {"name": "HOME", "value": "/tmp"},
        {"name": "SPARSELINE_RAY_JOB", "value": "{}"},
        {"name": "ARGO_NODE_ID", "value": "n"},
        {"name": "KFP_POD_NAME", "value": "p"},
        {"name": "SPARSELINE_METRICS_PORT", "value": "9464"},
        {"name": "SPARSELINE_RUN_ID", **of("fieldRef", fieldPath="metadata.labels['pipeline/runid']")},
        {"name": "SPARSELINE_POD_UID", **of("fieldRef", fieldPath="metadata.uid")},
        {"name": "AWS_SECRET_ACCESS_KEY", **of("secretKeyRef", name="sparseline-store", key="secretkey")},
        {"name": "MLFLOW_TRACKING_TOKEN", **of("secretKeyRef", name="kfp-mlflow-credentials", key="token")},
        {"name": "SPARSELINE_STORE", **of("configMapKeyRef", name="sparseline-settings", key="SPARSELINE_STORE")},
    ]
    main = {"name": "main", "image": f"registry.example.com/a@{TEST_DIGEST}", "env": env}
    spec = {"serviceAccountName": "pipeline-runner", "containers": [{"name": "wait", "image": "argoexec"}, main]}
    parsed = RayBlock.model_validate({"head": {}, "workers": {"workers": 2}, "timeout": 3600, **block})
    watcher = Watcher("pod", "uid-1", "team-a", spec)
    environment = {"SPARSELINE_RUN_ID": "run-1", "SPARSELINE_METRICS_PORT": "9464"}
    return ray_job(watcher, parsed, "run-1", "post_training", "s3://bucket/ray-jobs/a", "d" * 32, environment)


GPU_BLOCK = {
    "head": {"gpus": 1, "node_selector": {"gpu": "h100"}, "tolerations": [{"key": "nvidia.com/gpu"}]},
    "workers": {"workers": 4, "cpu": "8", "memory": "64Gi", "gpus": 2},
    "queue": "training",
}


@pytest.mark.parametrize("block", [{}, {"workers": {"workers": 0}}, GPU_BLOCK], ids=["small", "alone", "gpus"])
def test_a_rayjob_is_valid_and_safe(block):
    assert complaints([rayjob(**block)]) == []


def test_a_rayjob_belongs_to_its_watcher_and_ends_by_itself():
    job = rayjob(**GPU_BLOCK)
    (owner,) = job["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["uid"], owner["controller"], owner["blockOwnerDeletion"]) == (
        "Pod",
        "uid-1",
        False,
        False,
    )
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "training"
    assert len(job["metadata"]["name"]) <= 47
    spec = job["spec"]
    assert (spec["activeDeadlineSeconds"], spec["shutdownAfterJobFinishes"], spec["backoffLimit"]) == (3600, True, 0)
    (workers,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"] == 4
    assert spec["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_a_rayjob_s_pods_have_the_watcher_s_surroundings_and_none_of_its_identity():
    for pod in checks.pods(rayjob()):
        (container,) = pod["containers"]
        found = {one["name"]: one for one in container["env"]}
        assert not {name for name in found if name.startswith(("ARGO_", "KFP_", "SPARSELINE_POD_", "SPARSELINE_RAY"))}
        assert found["SPARSELINE_RUN_ID"] == {"name": "SPARSELINE_RUN_ID", "value": "run-1"}
        assert found["MLFLOW_TRACKING_TOKEN"]["valueFrom"]["secretKeyRef"]["name"] == "kfp-mlflow-credentials"
        assert found["SPARSELINE_STORE"]["valueFrom"]["configMapKeyRef"]["key"] == "SPARSELINE_STORE"
        assert pod["serviceAccountName"] == "pipeline-runner"
        assert container["image"].startswith("registry.example.com/a@")


def test_the_chart_s_policies_select_the_pods_of_a_rayjob():
    found = rendered("--values", CHART / "ci/distributed.yaml")
    (policy, _) = [
        one for one in found if one["kind"] == "NetworkPolicy" and one["metadata"]["name"] == "sparseline-ray"
    ]
    wanted = policy["spec"]["podSelector"]["matchLabels"].items()
    cluster = rayjob()["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert wanted <= group["template"]["metadata"]["labels"].items()
    (reaper,) = [one for one in found if one["kind"] == "Deployment" and one["metadata"]["name"].endswith("-reaper")]
    arguments = reaper["spec"]["template"]["spec"]["containers"][0]["args"]
    assert {"--namespace=team-a", "--namespace=team-b"} <= set(arguments)
    accounts = {
        (one["metadata"]["namespace"], one["subjects"][0]["name"])
        for one in found
        if one["kind"] == "RoleBinding" and one["roleRef"]["name"] == "sparseline-distributed"
    }
    assert accounts == {("team-a", "pipeline-runner"), ("team-b", "default-editor")}


def test_a_task_with_ray_is_a_small_pod_that_knows_itself():
    path = ROOT / "manifests/pipelines/training/distributed/pipeline.yaml"
    specification, platform = yaml.safe_load_all(path.read_text())
    name = "exec-post-training"
    container = specification["deploymentSpec"]["executors"][name]["container"]
    assert container["resources"]["resourceCpuLimit"] == "500m"
    (block,) = [one["value"] for one in container["env"] if one["name"] == "SPARSELINE_RAY_JOB"]
    assert json.loads(block)["workers"]["workers"] == 2
    own = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"][name]["fieldPathAsEnv"]
    assert {one["name"] for one in own} >= {"SPARSELINE_POD_NAME", "SPARSELINE_POD_UID", "SPARSELINE_POD_NAMESPACE"}


def test_what_a_task_reads_is_what_the_chart_writes():
    maps = {
        (one["metadata"]["namespace"], one["metadata"]["name"]): one
        for one in overlay("prod")
        if one["kind"] == "ConfigMap"
    }
    settings = maps["kubeflow", "sparseline-settings"]
    from pipelines.cluster import SETTING_NAMES

    assert set(SETTING_NAMES) <= set(settings["data"])


SERVED = ["--set", "serving.enabled=true"]
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
BAD_VALUES = {
    "an unknown key": (["--set", "mlflow.databse.kind=sqlite"], "databse"),
    "an unknown key at the top": (["--set", "servng.enabled=true"], "servng"),
    "a wrong type": (["--set-string", "serving.replicas=two"], "replicas"),
    "an unknown store": (["--set", "objectStore.kind=gcs"], "kind"),
    "a digest that is none": (["--set", "image.digest=sha256:abc"], "digest"),
    "a checkpoint's digest that is none": (["--set", "serving.digest=latest"], "digest"),
    "no secret of the store": ([*SERVED, "--set", "objectStore.existingSecret="], "kubectl create secret"),
    "no address of the store": (["--set", "objectStore.endpoint="], "needs objectStore.endpoint"),
    "no database secret": (["--set", "mlflow.database.kind=postgresql"], "needs mlflow.database.existingSecret"),
    "two replicas on SQLite": (["--set", "mlflow.replicas=2"], "mlflow.replicas above 1 needs"),
    "MinIO without an image": (
        ["--set", "objectStore.kind=minio,objectStore.endpoint="],
        "objectStore.image.repository",
    ),
    "a backup without a place": (["--set", "backup.enabled=true"], "needs backup.destination"),
    "a backup into a folder": (["--set", "backup.enabled=true,backup.destination=/backups"], "destination"),
    "RayJobs without a team": (["--set", "distributed.enabled=true"], "needs a namespace under teams"),
    "a typo in the reaper": (["--set", "distributed.reaper.grace=5"], "grace"),
    "a release without a repository": (["--set", "release.enabled=true"], "needs release.repository"),
    "a password in the repository's address": (
        ["--set", "release.enabled=true,release.repository=https://user:word@git.example.com/platform"],
        "repository",
    ),
    "a push without credentials": (
        ["--set", "release.enabled=true,release.repository=https://git.example.com/platform,release.commit=true"],
        "kubectl create secret generic sparseline-git",
    ),
    "an observer of nothing": (
        ["--set", "monitoring.observer.enabled=true,monitoring.observer.kfpEndpoint="],
        "needs monitoring.observer.kfpEndpoint",
    ),
    "no MLflow at all": (["--set", "mlflow.enabled=false"], "give mlflow.externalUri"),
    "an ingress without TLS": (
        ["--set", "mlflow.ingress.enabled=true,mlflow.ingress.host=a.example.com"],
        "plain HTTP is not offered",
    ),
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_bad_values_are_refused(case):
    arguments, told = BAD_VALUES[case]
    done = template("--values", CHART / "ci/external.yaml", *arguments)
    assert done.returncode != 0
    assert told in done.stderr


def deployment(**container):
    """A deployment that every check lets pass, changed by `container`."""
    good = {
        "name": "a",
        "image": f"registry.example.com/a@{TEST_DIGEST}",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "resources": {kind: {"cpu": "1", "memory": "1Gi"} for kind in ("requests", "limits")},
        **{probe: {"httpGet": {"path": "/", "port": 80}} for probe in PROBES},
    }
    pod = {
        "automountServiceAccountToken": False,
        "securityContext": {"runAsNonRoot": True, "runAsUser": 1, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [{**good, **container}],
    }
    labels = {"app": "a"}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "a"},
        "spec": {"selector": {"matchLabels": labels}, "template": {"metadata": {"labels": labels}, "spec": pod}},
    }


def test_a_good_deployment_passes():
    assert complaints([deployment()]) == []


@pytest.mark.parametrize(
    "policy, change, told",
    [
        (checks.restricted, {"securityContext": {}}, "may gain privileges"),
        (checks.restricted, {"securityContext": {"runAsUser": 0}}, "may run as root"),
        (checks.restricted, {"securityContext": {"capabilities": {"add": ["NET_ADMIN"]}}}, "keeps capabilities"),
        (checks.restricted, {"securityContext": {"readOnlyRootFilesystem": False}}, "can write to its root"),
        (checks.restricted, {"securityContext": {"seccompProfile": {"type": "Unconfined"}}}, "no seccomp profile"),
        (checks.restricted, {"ports": [{"containerPort": 1, "hostPort": 1}]}, "port of the host"),
        (checks.limits, {"resources": {"limits": {"cpu": "1"}}}, "no limit of memory"),
        (checks.probes, {"name": "b", "readinessProbe": None}, ""),
        (checks.digests, {"image": "python:3.11"}, "is not pinned by digest"),
        (checks.plain_secrets, {"env": [{"name": "AWS_SECRET_ACCESS_KEY", "value": "abc"}]}, "has a value"),
        (checks.plain_secrets, {"env": [{"name": "URI", "value": "postgresql://u:p@host/d"}]}, "a URL with a password"),
    ],
)
def test_each_policy_finds_its_bad_example(policy, change, told):
    bad = deployment(**change)
    if change.get("readinessProbe", "") is None:
        del bad["spec"]["template"]["spec"]["containers"][0]["readinessProbe"]
        told = "has no readinessProbe"
    assert any(told in one for one in policy(bad)), policy(bad)


def test_host_paths_and_host_networks_are_found():
    bad = deployment()
    pod = bad["spec"]["template"]["spec"]
    pod |= {"hostNetwork": True, "volumes": [{"name": "v", "hostPath": {"path": "/"}}]}
    del pod["automountServiceAccountToken"]
    told = " ".join(checks.restricted(bad))
    assert "hostNetwork" in told
    assert "is a hostPath" in told
    assert "token is mounted" in told


def test_a_secret_with_data_is_found():
    assert checks.plain_secrets({"kind": "Secret", "metadata": {"name": "s"}, "stringData": {"a": "b"}})


@pytest.mark.parametrize("version", checks.VERSIONS)
def test_the_schemas_find_bad_manifests(version):
    unknown, wrong = deployment(), deployment()
    unknown["spec"]["replcas"] = 1
    wrong["spec"]["replicas"] = "one"
    old = {"apiVersion": "policy/v1beta1", "kind": "PodDisruptionBudget", "metadata": {"name": "a"}}
    monitor = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "ServiceMonitor",
        "metadata": {"name": "a"},
        "spec": {"selector": {}, "endpoint": []},
    }
    for bad, told in (
        (unknown, "replcas"),
        (wrong, "is not of type"),
        (old, "has no policy/v1beta1"),
        (monitor, "endpoint"),
    ):
        assert any(told in one for one in checks.schema([bad], version)), told
