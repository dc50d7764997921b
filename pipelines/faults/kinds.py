"""The kinds of faults. Each prepares a case, strikes once while the command runs, and can be put right again.

| kind | what happens |
|---|---|
| kill | SIGKILL of one process of the run, drawn among all (the command, KFP's, a stage's, the store, a sandbox) |
| stop | SIGSTOP of one process below the command for 60 s, then SIGCONT |
| s3-away | the object store refuses connections, or takes them and does not answer, for 30 s |
| disk-full | the file system that holds the runs is full from a write on, until the command has ended (ENOSPC) |
| clock | the wall clock of all Python processes jumps, back or forth, by minutes or days (`clock.py`) |
"""

from __future__ import annotations

import dataclasses
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import psutil

from components.runtime.embedded_store import embedded_store
from components.runtime.errors import InputError
from pipelines.faults import clock
from pipelines.faults.case import Case, may_mount, what
from pipelines.faults.gate import Gate, How

STOP_SECONDS, AWAY_SECONDS = 60.0, 30.0
DISK = "8g"  # limit of the disk that is not full; a tmpfs takes what it holds
LATER_BYTES = 2_000_000  # a disk gets full up to this much after the moment
CLOCK_JUMPS = (-3 * 86400, -600, 600, 3 * 86400, 400 * 86400)  # seconds


@dataclass
class Strike:
    """What was done, and when by the monotonic clock. `right` puts it right once the command has ended."""

    done: dict[str, Any]
    at: float = field(default_factory=time.monotonic)
    right: Callable[[], None] = lambda: None


def ended(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether the command ended within so many seconds."""
    try:
        process.wait(seconds)
        return True
    except subprocess.TimeoutExpired:
        return False


class Fault:
    """A kind. `prepared` gives the case; `strike` is called at the moment that was drawn, while the command runs."""

    @staticmethod
    def possible() -> str:
        """Why this machine cannot do it, and what to do; "" when it can."""
        return ""

    @contextmanager
    def prepared(self, folder: Path, profile: str, rng: random.Random) -> Iterator[Case]:
        store = rng.choice(["", str(folder / "runs" / "store")])  # the embedded one, or a directory
        yield Case(folder, profile, store)

    def strike(self, case: Case, process: subprocess.Popen[bytes], rng: random.Random) -> Strike:
        raise NotImplementedError


class Kill(Fault):
    def strike(self, case: Case, process: subprocess.Popen[bytes], rng: random.Random) -> Strike:
        victim = rng.choice(_tree(process))
        strike = Strike({"victim": what(victim)})
        _send(victim, signal.SIGKILL, strike)
        return strike


class Stop(Fault):
    def strike(self, case: Case, process: subprocess.Popen[bytes], rng: random.Random) -> Strike:
        below = _tree(process)[1:]
        if not below:
            return Strike({"victim": "none: it had no process yet"})
        victim = rng.choice(below)
        strike = Strike({"victim": what(victim), "seconds": STOP_SECONDS})
        _send(victim, signal.SIGSTOP, strike)
        ended(process, STOP_SECONDS)
        strike.at = time.monotonic()
        _send(victim, signal.SIGCONT, strike)
        return strike


class StoreAway(Fault):
    @contextmanager
    def prepared(self, folder: Path, profile: str, rng: random.Random) -> Iterator[Case]:
        # ours, and not the command's: it lies beside the case
        with embedded_store(folder / "there" / "seaweedfs", folder / "there" / "seaweedfs.log") as store:
            host, _, port = store.endpoint.removeprefix("http://").rpartition(":")
            self.gate = Gate(host, int(port))
            variables = {
                "SPARSELINE_S3_ENDPOINT": f"http://127.0.0.1:{self.gate.port}",
                "AWS_ACCESS_KEY_ID": store.access_key,
                "AWS_SECRET_ACCESS_KEY": store.secret_key,
            }
            try:
                yield Case(folder / "case", profile, store.uri, variables)
            finally:
                self.gate.close()

    def strike(self, case: Case, process: subprocess.Popen[bytes], rng: random.Random) -> Strike:
        how = cast(How, rng.choice(["refuses", "hangs"]))
        self.gate.shut(how)
        until = time.monotonic() + AWAY_SECONDS
        ended(process, AWAY_SECONDS)
        while (left := until - time.monotonic()) > 0:  # it ended; the store is away nevertheless
            time.sleep(left)
        self.gate.open()
        return Strike({"store_was": {"refuses": "refusing", "hangs": "hanging"}[how], "seconds": AWAY_SECONDS})


class DiskFull(Fault):
    @staticmethod
    def possible() -> str:
        return "" if may_mount() else "a disk that gets full needs the right to mount one (Linux, root); leave it out"

    @contextmanager
    def prepared(self, folder: Path, profile: str, rng: random.Random) -> Iterator[Case]:
        runs = folder / "runs"
        runs.mkdir(parents=True)
        _mount("-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(runs))
        try:
            with super().prepared(folder, profile, rng) as case:
                yield case
        finally:
            subprocess.run(["umount", "--lazy", str(runs)], check=True)

    def strike(self, case: Case, process: subprocess.Popen[bytes], rng: random.Random) -> Strike:
        later = rng.randrange(LATER_BYTES)
        while True:
            used = psutil.disk_usage(str(case.runs)).used
            try:
                _mount("-o", f"remount,size={used + later}", str(case.runs))
                break
            except InputError:  # it grew beyond that between the two lines
                if psutil.disk_usage(str(case.runs)).used <= used + later:
                    raise
        return Strike(
            {"used_bytes": used, "free_bytes": later},
            right=lambda: _mount("-o", f"remount,size={DISK}", str(case.runs)),
        )


class Clock(Fault):
    @contextmanager
    def prepared(self, folder: Path, profile: str, rng: random.Random) -> Iterator[Case]:
        with super().prepared(folder, profile, rng) as case:
            yield dataclasses.replace(case, variables=clock.variables(folder))

    def strike(self, case: Case, process: subprocess.Popen[bytes], rng: random.Random) -> Strike:
        jump = rng.choice(CLOCK_JUMPS)
        clock.move(case.folder, jump)
        return Strike({"jump_seconds": jump}, right=lambda: clock.move(case.folder, 0))


KINDS: dict[str, type[Fault]] = {
    **{"kill": Kill, "stop": Stop, "s3-away": StoreAway, "disk-full": DiskFull, "clock": Clock}
}


def _tree(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The command and all below it, oldest first."""
    top = psutil.Process(process.pid)
    return [top, *sorted(top.children(recursive=True), key=lambda one: (one.create_time(), one.pid))]


def _send(process: psutil.Process, number: signal.Signals, strike: Strike) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        strike.done["victim"] += " (ended by itself)"


def _mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"mount {' '.join(arguments)}: {done.stderr.strip()}; run as root where mounts are allowed")
