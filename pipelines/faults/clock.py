"""A wall clock that is moved for the Python processes of a run, while they run.

Python reads `sitecustomize` at its start: ours makes `time.time` and `datetime.now` tell the machine's clock plus what
a file says. The monotonic clock stays, as it does where a wall clock is set. Why so: the machine's own clock belongs to
everybody on it, a Linux time namespace moves only the monotonic clock, and libfaketime 0.9.10 cannot move the wall
clock alone (Python's `time.sleep` then fails with EINVAL). What is not Python keeps the true time: SeaweedFS, whose
checks of signatures then see a client of another day, SQLite, and the times of files.
"""

from __future__ import annotations

import os
from pathlib import Path

from pipelines.code_digest import ROOT

FILE = "SPARSELINE_MOVED_CLOCK"  # variable: the file with the seconds to add
SHIM = f'''
import ctypes
import datetime
import gc
import os
import time

_file, _time, _time_ns = os.environ["{FILE}"], time.time, time.time_ns


def _moved():
    with open(_file) as stream:
        return int(stream.read())


def now(cls, tz=None):
    return cls.fromtimestamp(time.time(), tz)


def utcnow(cls):
    return cls.fromtimestamp(time.time(), datetime.timezone.utc).replace(tzinfo=None)


time.time = lambda: _time() + _moved()
time.time_ns = lambda: _time_ns() + _moved() * 1_000_000_000
# in place: compiled libraries know the class by its address and size, and would not bear another one
(_methods,) = gc.get_referents(datetime.datetime.__dict__)
_methods.update(now=classmethod(now), utcnow=classmethod(utcnow))
ctypes.pythonapi.PyType_Modified(ctypes.py_object(datetime.datetime))
'''


def variables(folder: Path) -> dict[str, str]:
    """Put the shim into `folder`. Returns what a process needs in its environment; the clock is not moved yet."""
    shim = folder / "shim"
    shim.mkdir(parents=True, exist_ok=True)
    (shim / "sitecustomize.py").write_text(SHIM)
    move(folder, 0)
    paths = [str(shim), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {FILE: str(folder / "clock"), "PYTHONPATH": os.pathsep.join(paths)}


def move(folder: Path, seconds: int) -> None:
    """From now on the clock of the processes with these variables is so many seconds ahead."""
    new = folder / "clock.new"
    new.write_text(f"{seconds}\n")
    new.replace(folder / "clock")
