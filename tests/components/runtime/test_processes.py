"""No child outlives its parent."""

import os
import signal
import subprocess
import sys

import psutil
import pytest

from components.runtime import processes

GRANDPARENT = """
import os, subprocess, sys, time
from components.runtime import processes
os.environ[processes.OWNER] = processes.identity()
# As under KFP: a shell stands between the owner and the stage.
child = subprocess.Popen(["sh", "-c", sys.executable + " -c \\"" + sys.argv[1] + "\\"; true"], start_new_session=True)
child.wait()
"""
STAGE = """
import time, os
from components.runtime import processes
processes.die_with_owner()
print(os.getpid(), flush=True)
time.sleep(600)
"""


def wait_gone(pid: int, seconds: float) -> bool:
    try:
        process = psutil.Process(pid)
        process.wait(timeout=seconds)
    except psutil.NoSuchProcess:
        return True
    except psutil.TimeoutExpired:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent signal is Linux's")
def test_a_started_child_dies_with_a_killed_parent():
    code = (
        "import sys, time\nfrom components.runtime import processes\n"
        "child = processes.start([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True)\ntime.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    assert psutil.pid_exists(pid)
    parent.kill()
    parent.wait()
    assert wait_gone(pid, 5)


def test_a_stage_behind_a_shell_dies_with_its_owner():
    owner = subprocess.Popen([sys.executable, "-c", GRANDPARENT, STAGE], stdout=subprocess.PIPE, text=True)
    pid = int(owner.stdout.readline())
    assert psutil.pid_exists(pid)
    owner.kill()
    owner.wait()
    assert wait_gone(pid, 5)


def test_without_an_owner_nothing_is_watched(monkeypatch):
    monkeypatch.delenv(processes.OWNER, raising=False)
    processes.die_with_owner()


def test_an_identity_is_not_shared_by_a_later_process():
    pid, started = processes.identity().split(":")
    assert int(pid) == os.getpid()
    assert float(started) == psutil.Process().create_time()


def test_stop_ends_a_child_that_ignores_sigterm_and_its_children():
    code = (
        "import signal, subprocess, sys, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "inner = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(inner.pid, flush=True)\ntime.sleep(600)"
    )
    child = processes.start([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    inner = int(child.stdout.readline())
    assert processes.stop(child, seconds=0.2) == -signal.SIGKILL
    assert wait_gone(inner, 5)


def test_stop_lets_a_child_end_by_itself():
    code = (
        "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
        "print('x', flush=True)\ntime.sleep(600)"
    )
    child = processes.start([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    child.stdout.readline()
    assert processes.stop(child, seconds=10) == 7
