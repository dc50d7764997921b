"""Child processes that never outlive their parent, however the parent ends."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import psutil

OWNER = "SPARSELINE_OWNER"  # "pid:start time" of the process that a run belongs to
PR_SET_PDEATHSIG = 1

# Loaded before any fork: a child between fork and exec must not load libraries.
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def _die_with_parent(parent: int) -> None:
    """Runs in the child before exec: the kernel kills it when the parent's thread that started it ends."""
    if _libc is not None:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # the parent died before prctl
            os._exit(1)


def die_with_parent() -> None:
    """For the first line of a worker process: the kernel kills it when the thread that started it ends."""
    _die_with_parent(os.getppid())


def threads_of_each(threads: int, processes: int) -> int:
    """CPU threads of each of `processes`; for `threads` 0 its share of this process's cores."""
    return threads or max(1, len(os.sched_getaffinity(0)) // processes)


def collect_rarely() -> None:
    """Have the cycle collector look at this process's objects less often.

    A stage holds records by the ten thousand for as long as it lives. At Python's default thresholds the collector
    walks them over and over, which is half the time that reading a task set takes.
    """
    gc.set_threshold(100_000, 50, 100)


def start(command: Sequence[str], *, environment: Mapping[str, str] | None = None, **options: Any) -> subprocess.Popen:
    """Start `command` in a session of its own; the kernel kills it when we die, even by SIGKILL.

    Call it from a thread that lives as long as the child shall. `options` go to `subprocess.Popen`.
    A session of its own keeps a terminal's Ctrl-C from the child: ending children is the parent's decision.
    """
    parent = os.getpid()
    return subprocess.Popen(
        list(command),
        env=dict(environment) if environment is not None else None,
        start_new_session=True,
        preexec_fn=lambda: _die_with_parent(parent),
        **options,
    )


def stop(process: subprocess.Popen, *, seconds: float = 3.0) -> int:
    """End `process` and its whole session: SIGTERM, then SIGKILL after `seconds`. Returns its exit code."""
    group = process.pid
    _signal_group(group, signal.SIGTERM)
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        pass
    finally:
        _signal_group(group, signal.SIGKILL)
    return process.wait()


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def identity(pid: int | None = None) -> str:
    """`pid:start time`, which no later process with the same pid can have."""
    pid = pid or os.getpid()
    return f"{pid}:{psutil.Process(pid).create_time()}"


def die_with_owner() -> None:
    """End this process group as soon as the process named in SPARSELINE_OWNER ends.

    Between a run and its stages stand a shell and the KFP runner, so the kernel's parent signal does not reach here.
    """
    owner = os.environ.get(OWNER)
    if not owner:
        return
    pid = int(owner.split(":", 1)[0])

    def gone() -> bool:
        try:
            return identity(pid) != owner
        except psutil.NoSuchProcess:
            return True

    def watch() -> None:
        try:
            descriptor = os.pidfd_open(pid)
        except (ProcessLookupError, AttributeError, OSError):
            descriptor = None
        if descriptor is not None and not gone():
            select.select([descriptor], [], [])  # readable when the process ends
        else:
            while not gone():
                threading.Event().wait(0.5)  # no pidfd here (macOS, old kernel): look twice a second
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, name="owner-watch", daemon=True).start()
