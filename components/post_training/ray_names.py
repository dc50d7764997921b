"""Short names for the folders in which Ray puts its sockets: a Unix socket's path may have 107 bytes.

A name is a folder in the system's temporary directory with one link in it. Whoever made it removes it; where a kill
kept that from happening, the next run does, since the link tells whose it was.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

PREFIX, LINK = "ray-", "r"


def _place() -> Path:
    """Not the temporary directory of this process: a run has its own, and its path may be long."""
    return Path("/tmp") if Path("/tmp").is_dir() else Path(tempfile.gettempdir())


def short_name(directory: Path) -> Path:
    """A short path to `directory`."""
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=_place()))
    (folder / LINK).symlink_to(directory.resolve(), target_is_directory=True)
    return folder / LINK


def remove_short_names(below: Path) -> None:
    """Remove all short names of directories in (or equal to) `below`, whether these still exist or not."""
    for link in _place().glob(f"{PREFIX}*/{LINK}"):
        if link.is_symlink() and link.readlink().is_relative_to(below.resolve()):
            shutil.rmtree(link.parent, ignore_errors=True)
