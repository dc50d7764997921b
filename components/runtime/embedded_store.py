"""The object store of a laptop: SeaweedFS from its wheel, started by us and gone with us.

Loopback only, ports that the kernel says are free, credentials that are random at every start and known to this
process and its children alone. The data stay in the folder, so the next run finds them.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil

from components.runtime import processes
from components.runtime.errors import InputError, disk_errors
from components.runtime.object_store import S3Store

BUCKET = "sparseline"
READY_SECONDS = 60.0
ATTEMPTS = 3
PORTS = (24000, 32000)
PORTS_FILE, SOCKETS = "ports.json", Path("/tmp")
TAKEN = ("address already in use", "Port allocation failed")  # how the server says that a port is not free
# Every listener of `weed mini`; a flag left out would mean a fixed port.
PORT_FLAGS = (
    "s3.port",
    "s3.port.grpc",
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "admin.port",
    "admin.port.grpc",
)


class EmbeddedStore(S3Store):
    """The store of a server that we started."""

    process: subprocess.Popen
    log: Path

    def why_gone(self) -> str:
        """That the server has ended, and what to do; "" while it runs."""
        if self.process.poll() is None:
            return ""
        return (
            f"the object store (SeaweedFS) ended with code {self.process.returncode} (killed? out of memory?); "
            f"its log is {self.log}; run the same command again to go on"
        )


class PortTaken(Exception):
    """Somebody took a port between our choice and the server's start: the server ended, or went to another port."""


def weed_program() -> Path | None:
    """The `weed` program of this environment, or None where its wheel does not exist (only Linux x86-64 has one)."""
    beside = Path(sys.executable).parent / "weed"
    found = str(beside) if beside.is_file() else shutil.which("weed")
    return Path(found) if found else None


def free_ports(count: int) -> list[int]:
    """`count` different loopback ports that are free now: all are held at once, so that none comes twice.

    They lie below the range from which the kernel gives ports to outgoing connections, so that no client of this
    machine can be given one of them between our choice and the server's start.
    """
    choose = random.SystemRandom()
    with ExitStack() as held:
        found: list[int] = []
        while len(found) < count:
            one = held.enter_context(socket.socket())
            try:
                one.bind(("127.0.0.1", choose.randrange(*PORTS)))
            except OSError:  # somebody has it
                continue
            found.append(int(one.getsockname()[1]))
        return found


@contextmanager
def embedded_store(directory: Path, log: Path) -> Iterator[EmbeddedStore]:
    """A running SeaweedFS over `directory`, answering our credentials. Stopped when the context ends.

    Raises InputError when it does not come up; the message names the log.
    """
    program = weed_program()
    if program is None:
        raise InputError("the program `weed` is missing; run `make install`, or give --store DIRECTORY or s3://BUCKET")
    with disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        log.parent.mkdir(parents=True, exist_ok=True)
        (directory / "mini.options").unlink(missing_ok=True)  # weed would take old ports from it
    _remove_sockets(directory)
    for attempt in range(ATTEMPTS):
        process, store = _start(program, directory, log)
        try:
            try:
                _await_ready(process, store, log)
            except PortTaken:
                if attempt + 1 == ATTEMPTS:
                    raise InputError(f"SeaweedFS found no free ports in {ATTEMPTS} tries; its log is {log}") from None
                continue
            yield store
            return
        finally:
            # SIGKILL at once: weed's own shutdown takes up to half a minute, and its files are append-only.
            processes.stop(process, seconds=0.0)
            _remove_sockets(directory)


def _start(program: Path, directory: Path, log: Path) -> tuple[subprocess.Popen, EmbeddedStore]:
    ports = dict(zip(PORT_FLAGS, free_ports(len(PORT_FLAGS)), strict=True))
    access_key, secret_key = secrets.token_hex(10), secrets.token_hex(20)
    command = [
        str(program),
        "-logtostderr=true",  # into our log, and no files of its own in the system's temporary directory
        "mini",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        f"-dir={directory}",
        *(f"-{flag}={port}" for flag, port in ports.items()),
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-admin.ui=false",
        "-webdav=false",
        "-master.telemetry=false",
        "-master.volumeSizeLimitMB=1024",
    ]
    (directory / PORTS_FILE).write_text(json.dumps(sorted(ports.values())))
    # Credentials go through the environment: a command line is readable by every user of the machine.
    environment = {**os.environ, "AWS_ACCESS_KEY_ID": access_key, "AWS_SECRET_ACCESS_KEY": secret_key}
    with log.open("wb") as output:
        process = processes.start(
            command, environment=environment, cwd=directory, stdout=output, stderr=subprocess.STDOUT
        )
    store = EmbeddedStore(f"s3://{BUCKET}", f"http://127.0.0.1:{ports['s3.port']}", access_key, secret_key)
    store.process, store.log = process, log
    return process, store


def _remove_sockets(directory: Path) -> None:
    """Remove the Unix sockets that `weed`, which has ended, left in /tmp: it lets nobody choose another place."""
    file = directory / PORTS_FILE
    if file.is_file():
        for port in json.loads(file.read_text()):
            for path in SOCKETS.glob(f"seaweedfs-*-{port}.sock"):
                path.unlink(missing_ok=True)
        file.unlink()


def _await_ready(process: subprocess.Popen, store: S3Store, log: Path) -> None:
    """Wait until the server stores and gives back an object under our credentials."""
    deadline = time.monotonic() + READY_SECONDS
    probe = f"ready/{secrets.token_hex(8)}"
    problem = ""
    while time.monotonic() < deadline:
        if process.poll() is not None:
            text = log.read_text(errors="replace")
            if any(sign in text for sign in TAKEN):
                raise PortTaken
            raise InputError(f"SeaweedFS ended with code {process.returncode}; its log is {log}:\n{text[-600:]}")
        if not _listens(
            process, store
        ):  # before that, whoever took the port would get our request, and may never answer
            time.sleep(0.05)  # between two looks at a starting server
            continue
        try:
            store.ensure_bucket()
            store.put_bytes(probe, probe.encode())
            if store.get_bytes(probe) == probe.encode():
                store.remove(probe)
                return
        except Exception as error:  # every kind of "not yet"; the last one is told when time is up
            problem = str(error)
        time.sleep(0.05)  # between two polls of a starting server
    raise InputError(f"SeaweedFS was not ready after {READY_SECONDS:.0f} s ({problem}); its log is {log}")


def _listens(process: subprocess.Popen, store: S3Store) -> bool:
    """Whether the server itself, and nobody else, listens on the port that we chose for S3."""
    port = int(store.endpoint.rpartition(":")[2])
    try:
        connections = psutil.Process(process.pid).net_connections(kind="tcp")
    except psutil.NoSuchProcess:
        return False
    return any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in connections)
