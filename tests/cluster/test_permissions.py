"""People's roles against the audit log: what is granted is used by the commands of the README, and nothing else is.

The verbs of Kubeflow Pipelines' own kinds are not looked at here: its API server asks whether somebody has them
(test_tenants.py), and no such request ever reaches the kinds.
"""

import pytest
import yaml

from tests.cluster.extensions import apply
from tests.cluster.permissions import granted, used
from tests.cluster.test_chart import CHART, namespace, render

PLACE, TEAM = "permissions", "permissions-team"
ASKED_ABOUT = {"experiments", "runs", "recurringruns", "jobs", "pipelines", "pipelineversions"}


@pytest.fixture(scope="module")
def release(cluster, kubelet, tmp_path_factory):
    """The chart with serving, one team, and a person for each role."""
    values = yaml.safe_load((CHART / "ci/external.yaml").read_text())
    values["serving"] = {"enabled": True}
    values["rbac"] = {
        "viewers": [{"kind": "User", "name": "viewer"}],
        "promoters": [{"kind": "User", "name": "promoter"}],
    }
    values["teams"] = [
        {
            "namespace": TEAM,
            "create": True,
            "quota": {"pods": "5"},
            "viewers": [{"kind": "User", "name": "team-viewer"}],
            "submitters": [{"kind": "User", "name": "team-submitter"}],
        }
    ]
    file = tmp_path_factory.mktemp("permissions") / "values.yaml"
    file.write_text(yaml.safe_dump(values))
    apply(cluster, [namespace(PLACE)])
    wanted = render("--namespace", PLACE, "--values", file)
    apply(cluster, wanted)
    cluster.kubectl("rollout", "status", "deployment/sparseline-serving", f"--namespace={PLACE}", "--timeout=60s")
    by_kserve = render("--namespace", PLACE, "--values", CHART / "ci/kserve.yaml")
    apply(cluster, [one for one in by_kserve if one["kind"] == "InferenceService"])
    yield
    cluster.kubectl("delete", "namespace", PLACE, TEAM, "--wait=false")


def look(cluster, user, place, resources):
    """`kubectl get`, of all, of one, and as they change."""
    for resource in resources:
        cluster.run(f"--as={user}", "get", resource, f"--namespace={place}")
        cluster.run(f"--as={user}", "get", resource, "any", f"--namespace={place}", check=False)
        watch = ("--watch", "--request-timeout=1s", f"--namespace={place}")
        cluster.run(f"--as={user}", "get", resource, *watch, check=False)


def logs(cluster, user, place):
    """`kubectl logs`: allowed, and then there is no kubelet to answer."""
    cluster.run(f"--as={user}", "logs", "any", f"--namespace={place}", check=False)
    cluster.run(f"--as={user}", "get", "--raw", f"/api/v1/namespaces/{place}/pods/any/log", check=False)


def test_a_viewer_of_the_release_uses_every_right_and_needs_no_other(own_cluster, cluster, release):
    kinds = "pods services events persistentvolumeclaims deployments statefulsets inferenceservices"
    look(cluster, "viewer", PLACE, kinds.split())
    logs(cluster, "viewer", PLACE)
    assert used(cluster, "viewer") == granted(cluster, PLACE, "sparseline-viewer")
    assert used(cluster, "viewer", decision="forbid") == set()


def test_a_promoter_changes_what_is_served_and_nothing_else(own_cluster, cluster, release):
    here, name = f"--namespace={PLACE}", "deployment/sparseline-serving"
    cluster.run("--as=promoter", "set", "env", name, "EXAMPLE=1", here)
    cluster.run("--as=promoter", "rollout", "restart", name, here)
    cluster.run("--as=promoter", "scale", name, "--replicas=2", here)
    cluster.run("--as=promoter", "get", name, "--subresource=scale", here)
    service = "inferenceservices.serving.kserve.io/sparseline-serving"
    change = '{"metadata": {"annotations": {"a": "b"}}}'
    cluster.run("--as=promoter", "patch", service, "--type=merge", "--patch", change, here)
    assert used(cluster, "promoter") == granted(cluster, PLACE, "sparseline-promoter")
    assert used(cluster, "promoter", decision="forbid") == set()
    for name in ("deployment/sparseline-mlflow", "secret/sparseline-store"):
        refused = cluster.run("--as=promoter", "patch", name, "--patch", change, here, check=False)
        assert "Forbidden" in refused.stderr


@pytest.mark.parametrize("user", ["team-viewer", "team-submitter"])
def test_a_member_of_a_team_uses_every_right_and_needs_no_other(own_cluster, cluster, release, user):
    look(cluster, user, TEAM, ["pods", "events", "resourcequotas"])
    logs(cluster, user, TEAM)
    for name in ("", "/any", "?watch=true&timeoutSeconds=1"):  # Argo's kind is not installed here, the right is asked
        raw = f"/apis/argoproj.io/v1alpha1/namespaces/{TEAM}/workflows{name}"
        cluster.run(f"--as={user}", "get", "--raw", raw, check=False)
    rights = {one for one in granted(cluster, TEAM, "sparseline-viewer") if one.resource not in ASKED_ABOUT}
    assert used(cluster, user) == rights
    assert used(cluster, user, decision="forbid") == set()
    others = granted(cluster, TEAM, "sparseline-submitter")
    assert {one.resource for one in others} <= ASKED_ABOUT
