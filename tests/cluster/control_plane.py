"""etcd, kube-apiserver, kube-controller-manager, the KubeRay operator and Kueue as processes of this machine.

Real programs, one process each; there is no node, so a pod stays Pending unless somebody plays its kubelet (`pods.py`).
Everything lies in one directory, and every process ends with the one that started it.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import trustme
import yaml

from components.runtime import processes
from components.runtime.embedded_store import free_ports
from tests.cluster.programs import program

START_SECONDS = 90.0
SERVICE_RANGE = "10.96.0.0/16"
AUDIT = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [{"level": "Metadata"}],
}


def own_address() -> str:
    """An address of this machine other than loopback, which endpoints of a cluster may not have."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.connect(("192.0.2.1", 9))  # nothing is sent: it only asks for the route
        return str(one.getsockname()[0])


def wait_for(condition: Callable[[], bool], what: str, seconds: float = START_SECONDS) -> None:
    """Return as soon as `condition` holds. Raises TimeoutError that says what did not happen."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not happen within {seconds:g} s")
        time.sleep(0.1)


class Kubectl:
    """A cluster as whoever is in its kubeconfig sees it."""

    def __init__(self, kubeconfig: Path, directory: Path) -> None:
        self.kubeconfig, self.directory = kubeconfig, directory
        self.host = own_address()
        self._kubectl = program("kubectl")

    def run(
        self, *arguments: str, input: str | None = None, check: bool = True, kubeconfig: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """kubectl with these arguments. Raises RuntimeError that shows what it printed."""
        done = subprocess.run(
            [str(self._kubectl), "--kubeconfig", str(kubeconfig or self.kubeconfig), *arguments],
            input=input,
            capture_output=True,
            text=True,
            timeout=120,
        )
        if check and done.returncode:
            raise RuntimeError(f"kubectl {' '.join(arguments)}: {done.stderr.strip() or done.stdout.strip()}")
        return done

    def kubectl(self, *arguments: str, input: str | None = None) -> str:
        """What kubectl prints."""
        return self.run(*arguments, input=input).stdout


class ExistingCluster(Kubectl):
    """A cluster that somebody else runs, with the custom resources of KubeRay, Kueue and the others installed."""


class ControlPlane(Kubectl):
    """The programs by name, their commands, and a kubeconfig of somebody who may do everything."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory / "kubeconfig", directory)
        self.audit_log = directory / "audit.log"
        self.running: dict[str, subprocess.Popen] = {}
        self.commands: dict[str, list[str]] = {}
        clients, peers, api, health, webhook, ray_health = free_ports(6)
        self.server = f"https://127.0.0.1:{api}"
        self._write_identities()
        etcd = f"http://127.0.0.1:{clients}"
        self.commands["etcd"] = [
            str(program("server")),
            f"--data-dir={directory / 'etcd'}",
            f"--listen-client-urls={etcd}",
            f"--advertise-client-urls={etcd}",
            f"--listen-peer-urls=http://127.0.0.1:{peers}",
            "--log-level=warn",
            "--unsafe-no-fsync",  # a test's data need not survive a power failure
        ]
        self.etcd = etcd
        self.commands["apiserver"] = [
            str(program("kube-apiserver")),
            f"--etcd-servers={etcd}",
            f"--secure-port={api}",
            f"--advertise-address={self.host}",
            f"--service-cluster-ip-range={SERVICE_RANGE}",
            f"--tls-cert-file={directory / 'server.pem'}",
            f"--tls-private-key-file={directory / 'server.key'}",
            f"--token-auth-file={directory / 'tokens.csv'}",
            f"--service-account-key-file={directory / 'accounts.key'}",
            f"--service-account-signing-key-file={directory / 'accounts.key'}",
            "--service-account-issuer=https://kubernetes.default.svc",
            "--authorization-mode=RBAC",
            "--allow-privileged",  # as clusters have it: what refuses such pods is Pod Security
            "--enable-aggregator-routing",  # to webhooks by their endpoints: nobody serves a service's address here
            f"--audit-policy-file={directory / 'audit.yaml'}",
            f"--audit-log-path={self.audit_log}",
            "--audit-log-maxsize=1000",
        ]
        self.commands["controller-manager"] = [
            str(program("kube-controller-manager")),
            f"--kubeconfig={self.kubeconfig}",
            f"--service-account-private-key-file={directory / 'accounts.key'}",
            f"--root-ca-file={directory / 'ca.pem'}",
            "--use-service-account-credentials",
            "--leader-elect=false",
            "--secure-port=0",
            "--concurrent-gc-syncs=4",
            # The node of pods.py has no heart to beat: it and its pods are not to be found unready for that.
            "--controllers=*,-node-lifecycle-controller,-taint-eviction-controller",
        ]
        self.commands["kuberay"] = [
            str(program("ray-operator")),
            "--enable-leader-election=false",
            "--metrics-addr=0",
            f"--health-probe-bind-address=127.0.0.1:{ray_health}",
            "--use-kubernetes-proxy",  # to Ray's dashboard by way of the API server, for this machine sees no service
        ]
        self.webhook = webhook
        self._write_kueue(webhook, health)
        self.commands["kueue"] = [str(program("kueue")), f"--config={directory / 'kueue.yaml'}", "--feature-gates="
                                  "VisibilityOnDemand=false"]  # fmt: skip

    def _write_identities(self) -> None:
        authority = trustme.CA()
        names = ("127.0.0.1", self.host, "localhost", "kubernetes.default.svc", "10.96.0.1")
        served = authority.issue_cert(*names)
        authority.cert_pem.write_to_path(self.directory / "ca.pem")
        (self.directory / "webhook").mkdir()
        (self.directory / "server.pem").write_bytes(b"".join(one.bytes() for one in served.cert_chain_pems))
        (self.directory / "server.key").write_bytes(served.private_key_pem.bytes())
        (self.directory / "accounts.key").write_bytes(authority.issue_cert("accounts").private_key_pem.bytes())
        token = os.urandom(16).hex()
        (self.directory / "tokens.csv").write_text(f'{token},admin,admin,"system:masters"\n')
        (self.directory / "audit.yaml").write_text(yaml.safe_dump(AUDIT))
        self.write_kubeconfig(self.kubeconfig, token)

    def write_kubeconfig(self, path: Path, token: str, namespace: str = "default") -> None:
        """A kubeconfig with this token."""
        cluster = {"server": self.server, "certificate-authority": str(self.directory / "ca.pem")}
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": "test", "user": {"token": token}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test", "namespace": namespace}}],
            "current-context": "test",
        }
        path.write_text(yaml.safe_dump(content))
        path.chmod(0o600)

    def _write_kueue(self, webhook: int, health: int) -> None:
        configuration = {
            "apiVersion": "config.kueue.x-k8s.io/v1beta2",
            "kind": "Configuration",
            "clientConnection": {"qps": 50, "burst": 100},
            "health": {"healthProbeBindAddress": f"127.0.0.1:{health}"},
            "metrics": {"bindAddress": "0"},
            "webhook": {"port": webhook, "host": self.host, "certDir": str(self.directory / "webhook")},
            "leaderElection": {"leaderElect": False},
            "internalCertManagement": {"enable": True},
            "integrations": {"frameworks": ["batch/job", "ray.io/rayjob"]},
        }
        (self.directory / "kueue.yaml").write_text(yaml.safe_dump(configuration))

    def start(self, name: str) -> None:
        """Start one of the programs; etcd and the API server answer when this returns."""
        log = (self.directory / f"{name}.log").open("ab")
        environment = {**os.environ, "KUBECONFIG": str(self.kubeconfig)}
        self.running[name] = processes.start(
            self.commands[name],
            environment=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=self.directory,
        )
        log.close()
        if name == "apiserver":
            wait_for(lambda: self.alive(name) and self.ready(), "the API server answering")
        else:
            self.alive(name)

    def alive(self, name: str) -> bool:
        """True. Raises RuntimeError with the end of its log where the program has ended."""
        code = self.running[name].poll()
        if code is not None:
            end = (self.directory / f"{name}.log").read_text()[-3000:]
            raise RuntimeError(f"{name} ended with {code}; the end of its log:\n{end}")
        return True

    def ready(self) -> bool:
        """Whether the API server calls itself ready."""
        done = self.run("get", "--raw", "/readyz", check=False)
        return done.returncode == 0 and done.stdout == "ok"

    def kill(self, name: str) -> None:
        """SIGKILL one of the programs."""
        process = self.running.pop(name)
        process.kill()
        process.wait()

    def stop(self) -> None:
        """End everything, the API server and etcd last."""
        for name in reversed(list(self.running)):
            processes.stop(self.running.pop(name), seconds=2)
