"""Ray for one stage: the cluster at RAY_ADDRESS, or one of our own on this machine for as long as the stage runs."""

from __future__ import annotations

import logging
import os
import secrets
import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from components.post_training.config import PostTrainingConfig
from components.post_training.ray_names import remove_short_names
from components.runtime.errors import InputError
from components.runtime.settings import NO_USAGE_REPORTING

OBJECT_STORE_BYTES = 200_000_000  # weights and trajectories in flight; Ray would take 30% of the memory
START_SECONDS, CONNECT_SECONDS = 120.0, 10.0
ENVIRONMENT_CPUS = 0.5  # of an environment actor


@contextmanager
def cluster(directory: Path, needed: dict[str, float]) -> Iterator[None]:
    """Connect this process to Ray. `directory`: where a cluster of our own keeps its logs and sockets.

    needed: resources (CPU, GPU) of all actors together. Raises InputError when the cluster does not have them, cannot
    be reached, or does not start.
    """
    os.environ.update({name: value for name, value in NO_USAGE_REPORTING.items() if name not in os.environ})
    address = os.environ.get("RAY_ADDRESS", "")
    head = None
    try:
        if not address:
            cpus = len(os.sched_getaffinity(0))
            require(needed, {"CPU": cpus}, "this machine")
            _authenticate()
            head, address = _start(directory, cpus)
        else:
            _reachable(address)
        import ray

        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise InputError(f"cannot connect to Ray at {address}: {error}; check RAY_ADDRESS") from error
        require(needed, ray.cluster_resources(), f"the Ray cluster at {address}")
        yield
    finally:
        if "ray" in sys.modules:
            import ray

            ray.shutdown()
        if head is not None:
            _stop(head)
            remove_short_names(directory)  # the head does, unless it was killed


def _authenticate() -> None:
    """Only this process and its children can join the cluster, and no token is left in the user's home.

    Ray reads these variables when it is first imported, once.
    """
    if "ray" not in sys.modules:
        os.environ.update({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)})
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")


def resources(config: PostTrainingConfig) -> dict[str, float]:
    """What all actors of a run need together."""
    each = config.worker_threads + config.environment_workers * ENVIRONMENT_CPUS
    return {"CPU": config.rollout_workers * each}


def require(needed: dict[str, float], found: dict[str, Any], where: str) -> None:
    """Raises InputError that names every resource of which `found` has less than `needed`."""
    short = [
        f"{amount:g} {name} (there are {float(found.get(name, 0)):g})"
        for name, amount in needed.items()
        if float(found.get(name, 0)) < amount
    ]
    if short:
        raise InputError(
            f"{where} does not have what the rollouts need: {', '.join(short)}; lower post_training.rollout_workers, "
            "worker_threads or environment_workers, or set RAY_ADDRESS to a larger cluster"
        )


def _start(directory: Path, cpus: int) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-m", "components.post_training.ray_head", str(directory), str(cpus)]
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "head.log").open("w") as log:
        # a session of its own: whoever kills our process group leaves the head alive to end what Ray started
        head = subprocess.Popen(
            [*command, str(OBJECT_STORE_BYTES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
    assert head.stdout is not None
    ready, _, _ = select.select([head.stdout], [], [], START_SECONDS)
    line = head.stdout.readline().strip() if ready else ""
    if ":" not in line:
        _stop(head)
        tail = (directory / "head.log").read_text()[-2000:]
        raise InputError(f"Ray did not start on this machine; the end of its log:\n{tail}")
    return head, line


def _stop(head: subprocess.Popen[str]) -> None:
    assert head.stdin is not None
    with suppress(BrokenPipeError):
        head.stdin.close()
    try:
        head.wait(timeout=10)
    except subprocess.TimeoutExpired:
        head.kill()
        head.wait()


def _reachable(address: str) -> None:
    """Raises InputError when nothing listens at host:port; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # "auto" and the like: Ray knows
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise InputError(f"nothing answers at RAY_ADDRESS {address}: {error}; start the cluster or unset it") from error
