"""Chart, overlays and compiled pipelines as Helm and Kustomize render them: schemas, policy, drift, bad input.

`make check-manifests` builds the tools once and runs this alone. Without them, what needs them is skipped.
"""

import importlib.util
import json
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
