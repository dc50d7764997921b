"""A control plane for the tests of this folder, or an existing cluster: `make test-cluster KUBECONFIG=file`."""

import os
from pathlib import Path

import pytest

from tests.cluster.control_plane import ControlPlane, ExistingCluster
from tests.cluster.extensions import apply, install_definitions, install_kueue
from tests.cluster.pods import NODE, Kubelet

EXISTING = os.environ.get("SPARSELINE_TEST_KUBECONFIG", "")


def pytest_collection_modifyitems(items):
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    for item in here:
        item.add_marker(pytest.mark.cluster)
        if EXISTING and "own_cluster" in item.fixturenames:
            item.add_marker(pytest.mark.skip(reason="kills or reads what an existing cluster does not give"))


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """A running control plane with all custom resources, KubeRay and Kueue."""
    directory = tmp_path_factory.mktemp("cluster")
    if EXISTING:
        yield ExistingCluster(Path(EXISTING), directory)
        return
    plane = ControlPlane(directory)
    try:
        plane.start("etcd")
        plane.start("apiserver")
        plane.start("controller-manager")
        apply(plane, [{"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}}])
        install_definitions(plane)
        plane.start("kuberay")
        install_kueue(plane)
        yield plane
    finally:
        plane.stop()


@pytest.fixture(scope="session")
def own_cluster(cluster):
    """The control plane of this machine, whose programs can be killed and whose audit log can be read."""
    return cluster


@pytest.fixture(scope="session")
def kubelet(cluster):
    """Somebody who plays the node, where there is none."""
    player = Kubelet(cluster)
    yield player
    player.stop()
