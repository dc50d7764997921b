"""Programs built from pinned Go modules into a cache outside the repository: Helm and Kustomize of tools/, and others.

python tests/manifests/tools.py     # builds what is missing, and prints where it lies
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

MODULES = Path(__file__).resolve().parent / "tools"
NAMES = ("helm", "kustomize")


class Unavailable(Exception):
    """The tool is not here and cannot be built."""


def cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparseline" / "tools"


def tool(name: str, build: bool = False, module: Path | None = None, ldflags: str = "-s") -> Path:
    """The program `name` of a module, tools/<name> by default; with `build`, built when the cache lacks it: minutes.

    A module may hold several programs, which are built together. Raises Unavailable where it is not there, and is not
    to be built or there is no Go for that.
    """
    module = module or MODULES / name
    pinned = hashlib.sha256(
        (module / "go.mod").read_bytes() + (module / "go.sum").read_bytes() + ldflags.encode()
    ).hexdigest()[:16]
    program = cache() / f"{name}-{pinned}"
    if program.is_file():
        return program
    if shutil.which("go") is None:
        found = shutil.which(name)
        if found:
            return Path(found)
        raise Unavailable(f"{name} is not installed, and there is no Go to build it; install Go 1.26 or {name}")
    if not build:
        raise Unavailable(f"{name} is not built yet; `make check-manifests` or `make test-cluster` builds it once")
    cache().mkdir(parents=True, exist_ok=True)
    with (cache() / f"{module.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not program.is_file():
            built = cache() / f"build-{module.name}"
            environment = {**os.environ, "CGO_ENABLED": "0", "GOBIN": str(built), "GOFLAGS": "-buildvcs=false"}
            command = ["go", "install", "-trimpath", f"-ldflags={ldflags}", "tool"]
            subprocess.run(command, cwd=module, env=environment, check=True)
            for one in built.iterdir():
                one.replace(cache() / f"{one.name}-{pinned}")
    return program


if __name__ == "__main__":
    for one in NAMES:
        print(tool(one, build=True))
