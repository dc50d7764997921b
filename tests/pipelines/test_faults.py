"""The machinery of drills: what it sees, what it refuses, and that a gate is really shut."""

import json
import os
import socket
import subprocess
import sys
import threading
import time

import psutil
import pytest

from components.runtime.errors import InputError
from pipelines import drill
from pipelines.faults import campaign, clock, judge, kinds
from pipelines.faults.campaign import Plan, kept_rows
from pipelines.faults.case import Case
from pipelines.faults.gate import Gate


@pytest.fixture
def echo():
    """A server that gives back what it gets; its port."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve():
        while True:
            try:
                one, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=lambda c=one: [c.sendall(data) for data in iter(lambda: c.recv(99), b"")]).start()

    threading.Thread(target=serve, daemon=True).start()
    yield server.getsockname()[1]
    server.close()


def client(port: int, seconds: float = 5.0) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=seconds)


def test_a_gate_passes_on_refuses_and_hangs(echo):
    gate = Gate("127.0.0.1", echo)
    with client(gate.port) as one:
        one.sendall(b"a" * 99)
        assert one.recv(99, socket.MSG_WAITALL) == b"a" * 99
        gate.shut("refuses")
        assert one.recv(1) == b""
    with pytest.raises(ConnectionRefusedError):
        client(gate.port)
    gate.open()
    with client(gate.port) as one:
        one.sendall(b"b")
        assert one.recv(1) == b"b"
        gate.shut("hangs")
        one.sendall(b"c")
        one.settimeout(0.3)
        with pytest.raises(TimeoutError):
            one.recv(1)
        gate.open()
        one.settimeout(5)
        assert one.recv(1) == b"c"
    gate.close()


def test_a_case_knows_nothing_of_the_process_that_starts_it(tmp_path, monkeypatch):
    """PyTorch sets the last one by itself; a case that inherits it has a cache outside its temporary directory."""
    for name in ("SPARSELINE_STORE", "AWS_ACCESS_KEY_ID", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(name, "/elsewhere")
    assert "/elsewhere" not in Case(tmp_path, "micro").environment().values()


def test_processes_of_a_case_are_found_even_when_they_lost_their_parent(tmp_path):
    case, other = Case(tmp_path / "a", "micro"), Case(tmp_path / "b", "micro")
    program = "import os, sys, time; os.fork() or (os.setsid(), print(os.getpid(), flush=True), time.sleep(600))"
    with subprocess.Popen(
        [sys.executable, "-c", program], env=case.environment(), stdout=subprocess.PIPE, text=True
    ) as parent:
        orphan = int(parent.stdout.readline())
    assert [one.pid for one in case.processes()] == [orphan]
    assert other.processes() == []
    case.end()
    psutil.wait_procs([psutil.Process(orphan)] if psutil.pid_exists(orphan) else [], timeout=10)
    assert case.remaining() == []


@pytest.mark.slow
def test_a_moved_clock_moves_the_wall_clock_alone(tmp_path):
    program = """
import datetime, pickle, sys, time
import mlflow, pyarrow, torch  # compiled libraries that look at the class
now = datetime.datetime.now(datetime.UTC)
print(time.time(), now.timestamp(), time.monotonic(), time.sleep(0.01))
assert isinstance(pickle.loads(pickle.dumps(now)), datetime.datetime)
"""
    variables = clock.variables(tmp_path)
    for jump in (0, -3 * 86400, 400 * 86400):
        clock.move(tmp_path, jump)
        environment = {**os.environ, **variables}
        told = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True)
        wall, date, monotonic = map(float, told.stdout.split()[:3])
        assert abs(wall - time.time() - jump) < 60
        assert abs(date - time.time() - jump) < 60
        assert abs(monotonic - time.monotonic()) < 60


def test_what_a_case_left_is_seen(tmp_path):
    case = Case(tmp_path, "micro")
    assert judge.left_behind(case) == []
    (case.temporary / "weed.log").touch()
    (case.shared / "sem").touch()
    (case.runs / ".incomplete-x").touch()
    assert judge.left_behind(case) == ["left behind: runs/.incomplete-x, tmp/weed.log, shm/sem"]


@pytest.mark.parametrize(
    "code,text,problem",
    [
        (0, "", ""),
        (-9, "", ""),
        (2, "the disk is full at /runs; free some space or choose another folder", ""),
        (2, "", "without a message"),
        (1, "Traceback (most recent call last):\n  ...\nKeyError: 'x'", "a traceback reached the user: KeyError: 'x'"),
        (-6, "a message that is long enough", "exit code -6"),
    ],
)
def test_how_a_command_stops(code, text, problem):
    found = "; ".join(judge.untold(code, text))
    assert found == problem or (problem and problem in found)


def test_a_plan_says_what_this_machine_cannot_do(monkeypatch):
    monkeypatch.setattr(kinds, "may_mount", lambda: False)
    Plan("micro", 0, {"kill": 1, "disk-full": 0}).check()
    with pytest.raises(InputError, match=r"disk-full: .* needs the right to mount"):
        Plan("micro", 0, {"kill": 1, "disk-full": 1}).check()


def row(number, wrong="", code="a", **more):
    values = {"moment": 3.0, "exit_codes": [-9, 3], "restarts": 1, "seconds_to_the_end": 20.0, "said": []}
    values |= {"seconds_to_the_first_new_step": 9.5, "victim": "weed"}
    return {"kind": "kill", "number": number, "code": code, "wrong": wrong, **values, **more}


def test_finished_cases_of_these_sources_are_kept(tmp_path):
    output, plan = tmp_path / "kills.json", Plan("micro", 4, {"kill": 2})
    assert kept_rows(output, plan, "a") == []
    rows = [row(0), row(1, code="b"), row(7)]
    output.write_text(json.dumps(campaign._document(plan, rows, "x", "a", 25.0)))
    assert kept_rows(output, plan, "a") == [row(0)]
    with pytest.raises(InputError, match="has the profile micro and seed 4; give another --output"):
        kept_rows(output, Plan("micro", 5, {"kill": 2}), "a")
    output.write_text("{}")
    with pytest.raises(InputError, match="no file of this command"):
        kept_rows(output, plan, "a")


def test_the_page_of_a_drill_tells_every_case(tmp_path):
    rows = [row(0), row(1, wrong="left behind: tmp/<weed>", said=["the object store ended"])]
    document = campaign._document(Plan("micro", 4, {"kill": 2}), rows, "x", "a", 25.0)
    page = drill.write_drill_page(tmp_path / "drill.html", document, {"disk-full": "needs root"}).read_text()
    for text in ("as it has to be", "left behind: tmp/&lt;weed&gt;", "the object store ended", "needs root"):
        assert text in page
    assert document["kinds"]["kill"] == {
        **{"cases": 2, "wrong": 1, "restarted": 2},
        **{"median_seconds_to_the_first_new_step": 9.5, "median_seconds_to_the_end": 20.0},
    }


def test_an_unknown_fault_is_refused(tmp_path):
    options = drill.DrillOptions("micro", 0, ["flood"], 1, tmp_path)
    with pytest.raises(InputError, match="--fault: unknown flood; known: kill, stop, s3-away, disk-full, clock"):
        drill.drill(options, None)
