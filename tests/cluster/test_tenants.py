"""Two teams of the chart on a real API server: each sees its own, and each denial is one."""

import json

import pytest
import yaml

from tests.cluster.extensions import apply
from tests.cluster.test_chart import CHART, namespace, render

TEAMS = {"tenant-a": "tenant-a-engineers", "tenant-b": "tenant-b-engineers"}
QUOTA = {"requests.cpu": "1", "requests.memory": "1Gi", "limits.cpu": "2", "limits.memory": "2Gi", "pods": "3"}


@pytest.fixture(scope="module")
def teams(cluster, kubelet, tmp_path_factory):
    values = yaml.safe_load((CHART / "ci/teams.yaml").read_text())
    values["teams"] = [
        {"namespace": name, "create": True, "quota": QUOTA, "submitters": [{"kind": "Group", "name": group}]}
        for name, group in TEAMS.items()
    ]
    file = tmp_path_factory.mktemp("teams") / "values.yaml"
    file.write_text(yaml.safe_dump(values))
    apply(cluster, [namespace("tenants")])
    apply(cluster, render("--namespace", "tenants", "--values", file))
    yield TEAMS
    cluster.kubectl("delete", "namespace", "tenants", *TEAMS, "--wait=false")


def pod(name, place, **changes):
    security = {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "runAsNonRoot": True,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    container = {"name": "main", "image": "example.com/none:1", "securityContext": security, **changes}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": place},
        "spec": {"containers": [container]},
    }


def as_member(cluster, team, *arguments):
    return cluster.run(f"--as=someone@{team}", f"--as-group={TEAMS[team]}", *arguments, check=False)


@pytest.mark.parametrize("own, other", [("tenant-a", "tenant-b"), ("tenant-b", "tenant-a")])
def test_a_team_sees_its_own_pods_and_not_the_other_s(cluster, teams, own, other):
    assert as_member(cluster, own, "get", "pods", f"--namespace={own}").returncode == 0
    for what in ("pods", "secrets", "configmaps"):
        refused = as_member(cluster, own, "get", what, f"--namespace={other}")
        assert refused.returncode != 0
        assert "Forbidden" in refused.stderr
    assert "Forbidden" in as_member(cluster, own, "get", "secrets", f"--namespace={own}").stderr
    assert "Forbidden" in as_member(cluster, own, "get", "pods", "--all-namespaces").stderr


@pytest.mark.parametrize("own, other", [("tenant-a", "tenant-b"), ("tenant-b", "tenant-a")])
def test_a_team_starts_runs_in_its_own_namespace_alone(cluster, teams, own, other):
    """Kubeflow Pipelines asks the API server this before it starts a run."""
    for place, answer in ((own, True), (other, False)):
        for verb in ("create", "terminate", "retry"):
            wanted = {"group": "pipelines.kubeflow.org", "resource": "runs", "verb": verb, "namespace": place}
            question = {
                "apiVersion": "authorization.k8s.io/v1",
                "kind": "SubjectAccessReview",
                "spec": {"user": f"someone@{own}", "groups": [TEAMS[own]], "resourceAttributes": wanted},
            }
            asked = cluster.run("create", "--filename=-", "--output=json", input=json.dumps(question))
            assert json.loads(asked.stdout)["status"]["allowed"] is answer


@pytest.mark.parametrize("team", TEAMS)
def test_a_quota_refuses_what_is_too_much_and_the_other_team_keeps_its_own(cluster, teams, team):
    (other,) = set(TEAMS) - {team}
    big = {"resources": {"requests": {"cpu": "600m", "memory": "100Mi"}, "limits": {"cpu": "800m", "memory": "100Mi"}}}
    apply(cluster, [pod("first", team, **big)])
    with pytest.raises(RuntimeError, match=r"exceeded quota: sparseline, requested: requests\.cpu=600m"):
        apply(cluster, [pod("second", team, **big)])
    apply(cluster, [pod("first", other, **big)])
    cluster.kubectl("delete", "pod", "first", f"--namespace={team}", "--now")
    cluster.kubectl("delete", "pod", "first", f"--namespace={other}", "--now")


@pytest.mark.parametrize("team", TEAMS)
def test_a_pod_without_requests_gets_the_limit_range_s(cluster, teams, team):
    """Kubeflow's own driver pods state none, and a quota would refuse them."""
    apply(cluster, [pod("driver", team)])
    found = json.loads(cluster.kubectl("get", "pod", "driver", f"--namespace={team}", "--output=json"))
    assert found["spec"]["containers"][0]["resources"] == {
        "limits": {"cpu": "500m", "memory": "512Mi"},
        "requests": {"cpu": "100m", "memory": "128Mi"},
    }
    cluster.kubectl("delete", "pod", "driver", f"--namespace={team}", "--now")


@pytest.mark.parametrize("team", TEAMS)
@pytest.mark.parametrize(
    "change",
    [
        {"securityContext": {"privileged": True}},
        {"securityContext": {"allowPrivilegeEscalation": False, "runAsUser": 0}},
        {"ports": [{"containerPort": 80, "hostPort": 80}]},
    ],
    ids=["privileged", "root", "host-port"],
)
def test_a_team_s_namespace_admits_restricted_pods_alone(cluster, teams, team, change):
    with pytest.raises(RuntimeError, match='violates PodSecurity "restricted'):
        apply(cluster, [pod("unsafe", team, **change)])
