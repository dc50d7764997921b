"""A Ray cluster on this machine that ends with the process that started it, however that ends.

    python -m components.post_training.ray_head TEMPORARY_DIRECTORY CPUS OBJECT_STORE_BYTES

Prints the cluster's address on one line of standard output, then waits until its standard input ends (the kernel closes
it with the parent, also after SIGKILL), ends everything that Ray started, and removes the directory's short name.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from components.post_training.ray_names import remove_short_names, short_name

PR_SET_CHILD_SUBREAPER = 36


def main() -> None:
    directory, cpus, store_bytes = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    # orphans of Ray's processes become our children, so that none is out of reach at the end
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    directory.mkdir(parents=True, exist_ok=True)
    try:
        short = short_name(directory)
        import ray

        started: Any = ray.init(
            num_cpus=cpus,
            num_gpus=0,
            include_dashboard=False,
            object_store_memory=store_bytes,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=str(short),
        )
        print(started.address_info["gcs_address"], flush=True)
        sys.stdin.read()
    finally:
        end_children()
        remove_short_names(directory)
        os._exit(0)


def end_children(seconds: float = 3.0) -> None:
    """Kill all descendants, and those that they still start meanwhile."""
    deadline = time.monotonic() + seconds
    while (children := _living_children()) and time.monotonic() < deadline:
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        time.sleep(0.02)
        with contextlib.suppress(ChildProcessError):  # reap what ended, orphans of Ray's processes too
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _living_children() -> list[psutil.Process]:
    living = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.status() != psutil.STATUS_ZOMBIE:
                living.append(child)
    return living


if __name__ == "__main__":
    main()
