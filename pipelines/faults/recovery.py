"""How long a killed training needs until it takes new steps, and what keeping its state costs.

    python -m pipelines.faults.recovery --profile nano --times 5 --seed 0 --output tests/results/recovery.json

A run is started; each time that a training stage has saved a state since the last kill, the whole command is killed by
SIGKILL at a random moment of the next seconds, and given again. Measured are the seconds from the kill to the first
step that goes on from the state, and, at the end of each training stage, the seconds that saving took of it: in its own
thread, where training waits, and in the background.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from components.runtime.errors import EXIT_INPUT, InputError
from components.runtime.result_file import frame
from components.runtime.stage import write_json
from components.runtime.tracking import read_metrics
from components.runtime.training_state import BACKGROUND_SECONDS, WAITED_SECONDS
from pipelines.faults.campaign import PACKAGES, scratch
from pipelines.faults.case import ENDED, Case, own_mounts
from pipelines.faults.kinds import ended

STAGES = ("pretraining", "post_training")
LOOK_SECONDS = 0.05
LIMIT_SECONDS = 1800.0  # without anything new


def newest(case: Case) -> tuple[str, Path] | None:
    """The training stage that the newest run is at, and its folder; None before the first."""
    runs = sorted(path for path in case.runs.glob("*-*-*") if (path / "pipeline.log").is_file())
    for stage in reversed(STAGES):
        folder = runs[-1] / "stages" / stage if runs else case.runs / stage
        if folder.is_dir() and not folder.is_symlink():  # a link: it comes from the cache
            return stage, folder
    return None


def events(folder: Path) -> list[dict[str, Any]]:
    """The progress that a stage told of so far."""
    path = folder / "progress.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines]


def went_on(told: Sequence[dict[str, Any]]) -> bool:
    """Whether a step was taken after the note that says where the training goes on."""
    notes = [place for place, event in enumerate(told) if event.get("text", "").startswith("goes on after step")]
    return bool(notes) and any(event["kind"] == "step" for event in told[notes[0] :])


def measure(case: Case, times: int, within: float, rng: random.Random, limit: float) -> list[dict[str, Any]]:
    """Kill `times` times, about half of them in each training stage; then wait for the end of the run.

    Raises RuntimeError when the run ends before, or nothing happens within the limit.
    """
    rows: list[dict[str, Any]] = []
    process = case.start()
    last: Path | None = None  # where the try before stopped
    for number in range(times):
        stage = STAGES[number * len(STAGES) // times]
        folder = _await(case, process, limit, last, is_saved, stage)
        ended(process, rng.uniform(0, within))
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed_at, last = time.monotonic(), folder
        process = case.start()
        _await(case, process, limit, last, went_on)
        rows.append({"stage": stage, "seconds": round(time.monotonic() - killed_at, 2)})
    if process.wait(limit) not in ENDED:
        raise RuntimeError(f"exit code {process.returncode}:\n{case.log.read_text()[-2000:]}")
    return rows


def _await(
    case: Case,
    process: subprocess.Popen[bytes],
    limit: float,
    last: Path | None,
    holds: Callable[[Sequence[dict[str, Any]]], bool],
    stage: str = "",
) -> Path:
    """Wait until `holds` of what the stage told (whichever runs, or this one); its folder, another than `last`."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        if ended(process, LOOK_SECONDS):
            raise RuntimeError(f"the run ended too early:\n{case.log.read_text()[-2000:]}")
        found = newest(case)
        if found and found[1] != last and stage in ("", found[0]) and holds(events(found[1])):
            return found[1]
    raise RuntimeError(f"nothing happened for {limit:.0f} s:\n{case.log.read_text()[-2000:]}")


def is_saved(told: Sequence[dict[str, Any]]) -> bool:
    """Whether a training state was whole."""
    return any(event["kind"] == "saved" for event in told)


def overhead(case: Case) -> dict[str, dict[str, float]]:
    """Of each training stage's last try: seconds, and those of saving."""
    found = {}
    for stage in STAGES:
        for folder in sorted(case.runs.glob(f"*-*-*/stages/{stage}")):
            if folder.is_symlink() or not (folder / "summary.json").is_file():
                continue
            curves, record = read_metrics(folder), json.loads((folder / "summary.json").read_text())
            waited, background = (curves[name][-1][1] for name in (WAITED_SECONDS, BACKGROUND_SECONDS))
            found[stage] = {
                "seconds": record["seconds"],
                "waited_seconds": round(waited, 2),
                "background_seconds": round(background, 2),
                "share_waited": round(waited / record["seconds"], 4),
                "share_all": round((waited + background) / record["seconds"], 4),
            }
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pipelines.faults.recovery", description=__doc__)
    parser.add_argument("--profile", default="nano")
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", dest="settings", action="append", default=[], help="STAGE.KEY=VALUE, over the profile")
    parser.add_argument("--within", type=float, default=30.0, help="seconds from a saved state to the kill, at most")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    own_mounts()
    words = ["python", "-m", "pipelines.faults.recovery", *(sys.argv[1:] if arguments is None else arguments)]
    try:
        with scratch() as folder:
            case = Case(folder / "recovery", options.profile, settings=options.settings)
            try:
                rows = measure(case, options.times, options.within, random.Random(options.seed), LIMIT_SECONDS)
                cost = overhead(case)
            finally:
                case.end()
    except InputError as error:
        print(f"recovery: {error}", file=sys.stderr)
        return EXIT_INPUT
    document = {
        **frame(shlex.join(words), PACKAGES),
        "profile": options.profile,
        "seed": options.seed,
        "median_seconds": statistics.median(row["seconds"] for row in rows),
        "kills": rows,
        "saving": cost,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.output, document)
    print(json.dumps(document, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
