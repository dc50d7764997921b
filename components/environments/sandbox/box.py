"""The sandbox as its user sees it: a program and a small library in, how it ended and what it printed out."""

from __future__ import annotations

import atexit
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from components.runtime.errors import InputError

_ZYGOTE = Path(__file__).with_name("zygote.py")
_GRACE_SECONDS = 10.0  # for the zygote's own work, beyond a program's wall clock


@dataclass(frozen=True)
class SandboxLimits:
    """What one program may use. There are no other processes for it: it may start threads only."""

    wall_seconds: float = 4.0
    cpu_seconds: int = 2
    memory_bytes: int = 256 << 20
    disk_bytes: int = 4 << 20
    files: int = 128
    output_bytes: int = 16 << 10


@dataclass(frozen=True)
class SandboxResult:
    """`ended`: ok, error (an exception, or an exit code), cpu, time, output, killed, or fault (of the box itself).

    `output` is what went to stdout and stderr, cut off at the limit; of an exception one line. `status` is the exit
    code, negative for a signal.
    """

    ended: str
    status: int
    output: str

    @property
    def ok(self) -> bool:
        return self.ended == "ok"


class Sandbox:
    """Runs programs one after the other. Starts its process with the first program, and again should it die.

    Raises InputError where the kernel refuses the namespaces: there is no weaker box to fall back to.
    """

    def __init__(self, limits: SandboxLimits | None = None) -> None:
        self.limits = limits or SandboxLimits()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        self._stream: Any = None
        self._owner = 0

    def run(self, program: str, library: Mapping[str, str] | None = None) -> SandboxResult:
        """Run `program` with the modules of `library` (file name -> source) beside it."""
        request = {"program": program, "library": dict(library or {}), **asdict(self.limits)}
        with self._lock:
            self._start()
            assert self._connection is not None
            self._connection.settimeout(self.limits.wall_seconds + _GRACE_SECONDS)
            try:
                self._stream.write(json.dumps(request).encode() + b"\n")
                self._stream.flush()
                line = self._stream.readline()
            except OSError as error:
                line, problem = b"", str(error)
            else:
                problem = "its process ended"
            if not line:
                self._stop()
                return SandboxResult("fault", 0, f"the sandbox did not answer: {problem}")
            answer = json.loads(line)
            if answer["ended"] == "fault":
                self._stop()
        return SandboxResult(answer["ended"], answer["status"], answer["output"])

    def _start(self) -> None:
        if self._process and self._owner == os.getpid() and self._process.poll() is None:
            return
        if self._owner == os.getpid():
            self._stop()
        ours, theirs = socket.socketpair()
        self._owner = os.getpid()
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(_ZYGOTE), str(theirs.fileno()), str(os.getpid())],
            pass_fds=[theirs.fileno()],
            env={},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        theirs.close()
        self._connection, self._stream = ours, ours.makefile("rwb")
        ours.settimeout(_GRACE_SECONDS)
        line = self._stream.readline()
        answer = json.loads(line) if line else {"ready": False, "error": "it ended at once"}
        if not answer["ready"]:
            self._stop()
            raise InputError(
                f"the sandbox for model-written code cannot start: {answer['error']}. It needs user namespaces: allow "
                "them (sysctl kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_userns=0), or "
                "leave out the environments that run code"
            )
        atexit.register(self.close)

    def _stop(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()
            if self._process.stderr:
                self._process.stderr.close()
        for one in (self._stream, self._connection):
            if one:
                one.close()
        self._process = self._connection = self._stream = None

    def close(self) -> None:
        """End the process. The sandbox may be used again."""
        with self._lock:
            if self._owner == os.getpid():
                self._stop()


def refusal() -> str:
    """Why the sandbox cannot start on this machine; "" where it can."""
    box = Sandbox()
    try:
        box.run("")
    except InputError as error:
        return str(error)
    finally:
        box.close()
    return ""
