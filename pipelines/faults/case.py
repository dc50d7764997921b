"""One disturbed run: a folder of its own, the command in it, and all that this command started.

As root on Linux each command gets a /tmp and a /dev/shm that only it sees, so that whatever it leaves there is found;
elsewhere, and where the program itself lies in /tmp, its TMPDIR is watched instead, and what goes to /tmp by a fixed
path is not seen.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import psutil

from components.runtime import processes
from components.runtime.object_store import ObjectStore
from components.runtime.settings import Settings
from pipelines.code_digest import ROOT
from pipelines.run import local_settings, only_run, open_or_embed

MARK = "SPARSELINE_CASE"  # in the environment of every process of a case
OWN_MOUNTS = "FAULTS_OWN_MOUNTS"
ENDED = (0, 3)  # promoted, or rejected by the gate
GRACE_SECONDS = 10.0  # for the kernel and Ray's head to end what lost its owner
_PRIVATE = 'mount --bind "$1" /tmp && mount --bind "$2" /dev/shm && shift 2 && exec "$@"'


@cache
def may_mount() -> bool:
    """Whether this process may have mounts of its own (root on Linux, and the container lets it)."""
    if sys.platform != "linux" or not shutil.which("unshare"):
        return False
    tried = ["unshare", "--mount", "--propagation", "private", "sh", "-c", "mount -t tmpfs tmpfs /mnt"]
    return subprocess.run(tried, capture_output=True).returncode == 0


@cache
def own_tmp() -> bool:
    """Whether a command gets a /tmp of its own: not where the program itself lies in /tmp, which that would hide."""
    program = (ROOT, Path(sys.prefix), Path(sys.base_prefix))
    return may_mount() and not any(place.resolve().is_relative_to("/tmp") for place in program)


def own_mounts() -> None:
    """Start this program again with mounts of its own, where it may have them: none outlives it then."""
    if may_mount() and OWN_MOUNTS not in os.environ:
        command = ["unshare", "--mount", "--propagation", "private", sys.executable, *sys.orig_argv[1:]]
        os.execvpe(command[0], command, {**os.environ, OWN_MOUNTS: "1"})


@dataclass
class Case:
    """`store` and `settings` as in `sparseline run --store, --set`; `variables` go to the command's environment."""

    folder: Path
    profile: str
    store: str = ""
    variables: Mapping[str, str] = field(default_factory=dict)
    settings: Sequence[str] = ()

    def __post_init__(self) -> None:
        for place in (self.runs, self.temporary, self.shared):
            place.mkdir(parents=True, exist_ok=True)

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    @property
    def temporary(self) -> Path:
        return self.folder / "tmp"

    @property
    def shared(self) -> Path:
        return self.folder / "shm"

    @property
    def log(self) -> Path:
        return self.folder / "command.log"

    def environment(self) -> dict[str, str]:
        # TORCHINDUCTOR_CACHE_DIR is set by PyTorch itself, in whatever process imported its compiler.
        drop = ("SPARSELINE_", "AWS_", "MLFLOW_", "RAY_", "TORCHINDUCTOR_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(drop)}
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        own = {MARK: str(self.folder), "PYTHONPATH": os.pathsep.join(paths), "TMPDIR": str(self.temporary)}
        if own_tmp():
            own["TMPDIR"] = "/tmp"
        return {**kept, **own, **self.variables}

    def start(self) -> subprocess.Popen[bytes]:
        """The command, as a user gives it."""
        command = [sys.executable, "-m", "pipelines.cli", "run", "--profile", self.profile, "--runs", str(self.runs)]
        command += ["--store", self.store] if self.store else []
        command += [word for one in self.settings for word in ("--set", one)]
        if own_tmp():
            private = ["unshare", "--mount", "--propagation", "private", "sh", "-c", _PRIVATE, "case"]
            command = [*private, str(self.temporary), str(self.shared), *command]
        with self.log.open("ab") as log:
            return processes.start(command, environment=self.environment(), cwd=ROOT, stdout=log, stderr=log)

    def processes(self) -> list[psutil.Process]:
        """All living processes of the case, oldest first, also those that lost their parent."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                    continue
                words = [process.environ().get(MARK), *process.cmdline()]
            except psutil.Error:
                continue
            if any(word and str(self.folder) in word for word in words):
                found.append(process)
        return sorted(found, key=lambda one: (one.create_time(), one.pid))

    def remaining(self) -> list[psutil.Process]:
        """Processes that are still there when the command has ended and a while is over."""
        deadline = time.monotonic() + GRACE_SECONDS
        while (found := self.processes()) and time.monotonic() < deadline:
            psutil.wait_procs(found, timeout=0.5)
        return found

    def end(self) -> None:
        """Kill whatever is left: the next case must not meet it."""
        for process in self.processes():
            try:
                process.kill()
            except psutil.Error:
                continue

    @contextmanager
    def opened(self) -> Iterator[tuple[Settings, ObjectStore]]:
        """The case's store, while no command uses it."""
        settings = local_settings(self.runs, self.store)
        named = {"SPARSELINE_S3_ENDPOINT": "s3_endpoint", "AWS_ACCESS_KEY_ID": "access_key"}
        named |= {"AWS_SECRET_ACCESS_KEY": "secret_key"}
        update = {name: self.variables[variable] for variable, name in named.items() if variable in self.variables}
        with only_run(self.runs), open_or_embed(settings.model_copy(update=update)) as (opened, store):
            yield opened, store


def what(process: psutil.Process) -> str:
    """A telling name of a process, without paths."""
    try:
        words = process.cmdline()
        for word in words:
            name = Path(word).name
            if word in ("pipelines.cli", "pipelines.execute", "kfp.dsl.executor_main") or name in ("zygote.py", "weed"):
                return name
            if "spawn_main" in word or "resource_tracker" in word:
                return word.split(" ")[1].split(".")[-1]
        return Path(words[0]).name if words else process.name()
    except psutil.Error:
        return "gone"
