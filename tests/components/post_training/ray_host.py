"""A real Ray head of this machine with its dashboard, as the head's pod of a RayJob runs one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[3]


def start_head(folder: Path, address: str, dashboard: int, environment: Mapping[str, str]) -> subprocess.Popen:
    """A head whose dashboard listens on this port. `folder`: for its files, with a short path."""
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=2", "--port=0",
        f"--node-ip-address={address}", "--dashboard-host=0.0.0.0", f"--dashboard-port={dashboard}",
        "--object-store-memory=80000000", f"--temp-dir={folder}", "--disable-usage-stats",
    ]  # fmt: skip
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    own = {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    with (folder / "start.log").open("wb") as log:
        merged = {**os.environ, **own, **environment, "PATH": path}  # `python` is ours, as in the image
        return subprocess.Popen(command, env=merged, stdout=log, stderr=subprocess.STDOUT, cwd=folder)


def answers(address: str, dashboard: int) -> bool:
    """Whether the dashboard takes jobs."""
    with suppress(urllib.error.URLError, TimeoutError, ConnectionError):
        return urllib.request.urlopen(f"http://{address}:{dashboard}/api/version", timeout=2).status == 200
    return False


def stop_head(process: subprocess.Popen, folder: Path) -> None:
    """Kill all that the head has started, as a node does that is lost, and remove its files."""
    family = [one for one in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(one.info["cmdline"] or [])]
    with suppress(psutil.NoSuchProcess):
        family.append(psutil.Process(process.pid))
    for one in [*family, *(child for parent in family for child in _children(parent))]:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()
    shutil.rmtree(folder, ignore_errors=True)


def _children(process: psutil.Process) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return process.children(recursive=True)
    return []
