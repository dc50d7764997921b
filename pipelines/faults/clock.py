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
import copyreg
import datetime
import os
import time

_file, _time, _time_ns, _datetime = os.environ["{FILE}"], time.time, time.time_ns, datetime.datetime


def _moved():
    with open(_file) as stream:
        return int(stream.read())


class _Type(type(_datetime)):
    def __instancecheck__(cls, value):
        return isinstance(value, _datetime)


class _Moved(_datetime, metaclass=_Type):
    @classmethod
    def now(cls, tz=None):
        return _datetime.fromtimestamp(time.time(), tz)

    @classmethod
    def utcnow(cls):
        return _datetime.fromtimestamp(time.time(), datetime.timezone.utc).replace(tzinfo=None)

    @classmethod
    def today(cls):
        return cls.now()


def _again(*parts):
    return _datetime(*parts)


def _parts(value):
    v = value
    return _again, (v.year, v.month, v.day, v.hour, v.minute, v.second, v.microsecond, v.tzinfo)


copyreg.pickle(_datetime, _parts)  # which has no name any more
_Moved.__name__ = _Moved.__qualname__ = "datetime"
_Moved.__module__ = "datetime"
time.time = lambda: _time() + _moved()
time.time_ns = lambda: _time_ns() + _moved() * 1_000_000_000
datetime.datetime = _Moved
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
