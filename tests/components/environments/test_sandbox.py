"""The sandbox: what runs in it, and sixty-odd programs that want out. The host is looked at from the outside."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import psutil
import pytest

from components.environments.sandbox import Sandbox, SandboxLimits
from components.environments.sandbox.syscalls import REFUSED, filter_program
from tests.components.environments.hostile import HOSTILE
from tests.components.environments.marks import runs_code

pytestmark = runs_code
LIMITS = SandboxLimits(
    wall_seconds=2.0, cpu_seconds=1, memory_bytes=128 << 20, disk_bytes=2 << 20, output_bytes=2 << 10
)


@pytest.fixture(scope="module")
def box():
    made = Sandbox(LIMITS)
    yield made
    made.close()


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    folder = tmp_path_factory.mktemp("host")
    (folder / "secret").write_text("the answer is 37")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        yield folder, listener


def test_a_program_sees_its_library_and_the_standard_library(box):
    result = box.run(
        "import json, tools\nprint(json.dumps(tools.double(21)))", {"tools.py": "def double(x): return 2 * x"}
    )
    assert (result.ended, result.status, result.output) == ("ok", 0, "42\n")
    failed = box.run("1 / 0")
    assert (failed.ended, failed.status, failed.output) == ("error", 1, "ZeroDivisionError: division by zero\n")
    assert box.run("raise SystemExit(3)").status == 3
    assert (
        box.run("import threading\nt = threading.Thread(target=print, args=(5,))\nt.start()\nt.join()").output == "5\n"
    )


def test_nothing_of_a_program_is_there_for_the_next(box):
    box.run("import builtins, sys, tools\nbuiltins.leaked = 1\nopen('left', 'w').write('x')", {"tools.py": ""})
    result = box.run(
        "import os, sys\nprint(sorted(os.listdir('.')), 'tools' in sys.modules, 'leaked' in dir(__builtins__))"
    )
    assert result.output == "['.null'] False False\n"


def test_no_text_of_a_program_is_left_in_the_memory_of_the_next(box):
    box.run("1", {"tools.py": "# QWERTYUIOP\n" * 200})
    search = (
        "import ctypes, gc\nlibc = ctypes.CDLL(None)\nword = bytes(c ^ 1 for c in b'PVDSUX')\n"
        "flags = (ctypes.c_ubyte * 256)()\nfound = mine = 0\n"
        "held = 'W' + 'HIDING' * 40\n"
        "for area in {id(one) & ~0xFFFFF for one in gc.get_objects()}:\n"
        " for page in range(area, area + (1 << 20), 4096):\n"
        "  if libc.mincore(ctypes.c_void_p(page), ctypes.c_size_t(4096), flags) == 0:\n"
        "   text = ctypes.string_at(page, 4096)\n"
        "   found = max(found, text.count(word))\n   mine += text.count(b'HIDINGHIDING')\n"
        "print(found, mine > 0)"
    )
    result = box.run(search)
    assert result.ok, result
    found, sees_memory = result.output.split()
    assert sees_memory == "True"  # the search does find what is there
    assert int(found) <= 1  # the word that is looked for


def test_the_sandbox_outlives_the_thread_that_started_it():
    one, started, running = Sandbox(), threading.Event(), threading.Event()

    def starter():
        one.run("1")
        started.set()
        running.wait()

    thread = threading.Thread(target=starter)
    thread.start()
    started.wait()
    process = one._process
    results = []
    other = threading.Thread(target=lambda: results.append(one.run("import time\ntime.sleep(1)\nprint(2)")))
    other.start()
    running.set()
    thread.join()
    other.join()
    assert [result.output for result in results] == ["2\n"]
    assert one._process is process
    one.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_hostile(box, host, name):
    folder, listener = host
    source = HOSTILE[name]
    for placeholder, value in (("HOST", folder), ("PORT", listener.getsockname()[1]), ("OWNER", os.getpid())):
        source = source.replace(placeholder, str(value))
    box.run("1")  # its own processes are there before
    before = {process.pid for process in psutil.process_iter()}
    started = time.monotonic()
    result = box.run(source)
    assert time.monotonic() - started < LIMITS.wall_seconds + 2
    assert not result.ok, result
    assert result.ended != "fault", result
    assert "ESCAPED" not in result.output
    assert "the answer is" not in result.output
    assert len(result.output) <= LIMITS.output_bytes
    # the host, from the outside
    assert sorted(path.name for path in folder.iterdir()) == ["secret"]
    assert (folder / "secret").read_text() == "the answer is 37"
    with pytest.raises(BlockingIOError):
        listener.accept()
    zygotes = {process.pid for process in psutil.Process(box._process.pid).children(recursive=True)}
    nobody = [p for p in psutil.process_iter(["username", "name"]) if p.pid in zygotes - before]
    assert nobody == []
    assert box.run("print('still here')").output == "still here\n"


def test_the_sandbox_dies_with_its_owner(tmp_path):
    program = (
        "import os, sys, time\nfrom components.environments.sandbox import Sandbox\nbox = Sandbox()\nbox.run('1')\n"
        "print(box._process.pid, flush=True)\nbox.run('import time; time.sleep(60)')"
    )
    owner = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    zygote = psutil.Process(int(owner.stdout.readline()))
    family = [zygote, *zygote.children(recursive=True)]
    owner.send_signal(signal.SIGKILL)
    owner.wait(timeout=5)
    _, alive = psutil.wait_procs(family, timeout=5)
    assert alive == []


def test_a_killed_sandbox_starts_again(box):
    box.run("1")
    box._process.kill()
    box._process.wait(timeout=5)
    assert box.run("print(1)").output == "1\n"


def test_the_filter_knows_both_machines_and_no_other():
    for machine in ("x86_64", "aarch64"):
        assert len(filter_program(machine)) % 8 == 0
        assert len(filter_program(machine)) // 8 < 4096
    with pytest.raises(RuntimeError, match="not of riscv64"):
        filter_program("riscv64")
    assert {"ptrace", "mount", "unshare", "bpf", "socket"} <= set(REFUSED)
