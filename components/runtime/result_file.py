"""The frame of a result file: on what, with what, when and by which command the numbers were measured."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil


def frame(command: str, packages: Sequence[str]) -> dict[str, Any]:
    """Hardware, versions of `packages`, date and command."""
    return {
        "hardware": hardware(),
        "versions": {"python": platform.python_version(), **{package: version(package) for package in packages}},
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "command": command,
    }


def hardware() -> dict[str, Any]:
    """Processor, cores and memory (GB) of this machine."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": model, "cores": cores, "memory_gb": round(psutil.virtual_memory().total / 1e9, 1), "gpu": None}
