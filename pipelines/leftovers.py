"""What killed runs left in a runs folder, and in the system's temporary directory, removed before the next one starts.

Whoever calls `sweep` holds the folder (`only_run`), so that nothing below it is in use. What a finished or failed
stage keeps is not touched: only what nobody can read any more goes.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from components.post_training.ray_names import remove_short_names

TEMPORARY = "tmp"  # of a run: what its processes put into their temporary directory
HALF_WRITTEN = (".incomplete-*", ".kfp_cache_*.tmp")
_PLACES = (".", "*", "*/stages/*", "*/stages/*/artifacts", "kfp/cache")


def temporary(run: Path) -> Path:
    """The temporary directory of a run's processes."""
    return run / TEMPORARY


def leftovers(runs: Path) -> Iterator[Path]:
    """Files and folders of runs that were killed, which no later run reads."""
    for run in (path for path in runs.iterdir() if (path / "pipeline.log").is_file() and not path.is_symlink()):
        if temporary(run).exists():
            yield temporary(run)
        for stage in run.glob("stages/*"):
            ended = (stage / "summary.json").is_file() or (stage / "failure.json").is_file()
            if not ended and (stage / "work").exists():
                yield stage / "work"
    for place in _PLACES:
        for folder in runs.glob(place) if place != "." else [runs]:
            for pattern in HALF_WRITTEN:
                yield from folder.glob(pattern)


def sweep(runs: Path) -> list[Path]:
    """Remove the leftovers. Returns what they were."""
    found = sorted(set(leftovers(runs)))
    for path in found:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    remove_short_names(runs)
    return found
