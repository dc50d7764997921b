"""The programs of a control plane, built from the pinned Go modules in modules/ into a cache outside the repository.

    python -m tests.cluster.programs     # builds what is missing, and prints where it lies

Kubernetes: 5 minutes on two cores without Go's build cache, seconds with it. etcd, KubeRay and Kueue: a minute each.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

from tests.manifests import tools

MODULES = Path(__file__).resolve().parent / "modules"
# Program to module. etcd's program is called after the folder of its sources.
PROGRAMS = {
    "kube-apiserver": "kubernetes",
    "kube-controller-manager": "kubernetes",
    "kubectl": "kubernetes",
    "server": "etcd",
    "ray-operator": "kuberay",
    "kueue": "kueue",
}
# CustomResourceDefinitions, each in the module that it comes from: version, what `go mod download` found there, files.
DEFINITIONS: dict[str, tuple[str, str, tuple[str, ...]]] = json.loads((MODULES / "definitions.json").read_text())


def kubernetes_version() -> str:
    """The pinned version of Kubernetes, `v1.36.3`."""
    found = re.search(r"k8s\.io/kubernetes (v[0-9.]+)", (MODULES / "kubernetes" / "go.mod").read_text())
    assert found
    return found[1]


def program(name: str, build: bool = True) -> Path:
    """The program, built where it is missing. Raises tools.Unavailable without Go."""
    module = PROGRAMS[name]
    flags = "-s"
    if module == "kubernetes":  # else it calls itself v0.0.0, and charts that ask for a version refuse it
        version = kubernetes_version()
        _, minor, _ = version.split(".")
        values = {"gitVersion": version, "gitMajor": "1", "gitMinor": minor}
        flags += "".join(f" -X k8s.io/component-base/version.{key}={value}" for key, value in values.items())
    return tools.tool(name, build=build, module=MODULES / module, ldflags=flags)


def sources(module: str) -> Path:
    """Where Go keeps the sources of one of DEFINITIONS; fetched where they are missing.

    Raises RuntimeError when what was fetched is not what is pinned.
    """
    version, pinned, _ = DEFINITIONS[module]
    command = ["go", "mod", "download", "-json", f"{module}@{version}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=MODULES)
    found = json.loads(done.stdout)
    if done.returncode or found["Sum"] != pinned:
        raise RuntimeError(f"{module}@{version}: {found.get('Error') or 'not the sources that definitions.json pins'}")
    return Path(found["Dir"])


def definitions() -> list[Path]:
    """The files of all CustomResourceDefinitions that our manifests use."""
    return [
        path
        for module, (_, _, patterns) in DEFINITIONS.items()
        for pattern in patterns
        for path in sorted(sources(module).glob(pattern))
    ]


if __name__ == "__main__":
    for one in PROGRAMS:
        print(program(one))
    print(*definitions(), sep="\n")
