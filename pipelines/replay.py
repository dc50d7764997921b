"""`sparseline replay RUN STEP`: executes a step of a run's post-training again, from its records.

Exit code 0 when everything came out bitwise the same and engine and learner agree, 3 when something did not.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from components.post_training.config import PostTrainingConfig
from components.post_training.measurements import Material
from components.post_training.records import ABOUT, DIGESTS, recorded
from components.post_training.replay import read_record, replay
from components.runtime import artifacts, errors
from components.runtime.contracts import Pointer
from components.runtime.errors import InputError
from components.runtime.settings import Settings
from components.runtime.stage import parse_config
from pipelines.display import marked_table
from pipelines.run import only_run, open_or_embed
from pipelines.runs import named

EXIT_DIFFERENT = errors.EXIT_REJECTED
_MARKS = {True: "same", False: "DIFFERS", None: ""}


def replay_step(settings: Settings, run: str, step: int, console: Console) -> int:
    """Execute step `step` (counted from 1) of the run again and print what was compared. Returns the exit code.

    Raises InputError for a run or a step that there are no records of.
    """
    directory = named(settings.runs, run).directory / "stages" / "post_training"
    records = records_of(directory)
    earlier = [number for number in records if number <= step]
    if not earlier:
        raise InputError(f"steps are counted from 1: {step} is none")
    digests = digests_of(directory)
    last = max([*records, *(int(one["step"]) for one in digests)])
    if step > last:
        raise InputError(f"the post-training of this run took {last} steps; step {step} is none of them")
    number = max(earlier)
    if number < step:
        console.print(f"step {step} was not recorded: executing {number} to {step}, from the record of step {number}")
    with (
        only_run(settings.runs),
        open_or_embed(settings) as (_, store),
        tempfile.TemporaryDirectory(prefix="sparseline-replay-") as folder,
    ):
        place = artifacts.fetch(store, records[number], Path(folder))
        about = json.loads((place / ABOUT).read_text())
        config = parse_config(PostTrainingConfig, about["config"], f"the configuration of {records[number].uri}")
        inputs = {
            name: artifacts.fetch(store, Pointer(**pointer), Path(folder)) for name, pointer in about["inputs"].items()
        }
        material = Material(inputs["tasks"], inputs["checkpoint"], config)
        findings = []
        for finding in replay(read_record(place, material), material, step, digests):
            console.print(f"{_MARKS[finding.holds] or 'not compared'}: {finding.name}", soft_wrap=True)
            findings.append(finding)
    rows = [(_MARKS[finding.holds], finding.name, finding.detail) for finding in findings]
    console.print(marked_table("compared", "found", rows))
    return EXIT_DIFFERENT if any(finding.holds is False for finding in findings) else 0


def records_of(directory: Path) -> dict[int, Pointer]:
    """The recorded steps of the stage whose records are in `directory`, by number.

    Raises InputError where there are none.
    """
    path = directory / "summary.json"
    if not path.is_file():
        raise InputError(f"{path} does not exist: the run has no post-training that came to its end")
    outputs = json.loads(path.read_text())["outputs"]
    found = recorded({name: Pointer(**pointer) for name, pointer in outputs.items()})
    if not found:
        raise InputError(f"{directory} has no recorded step; train with post_training.record_every above 0")
    return found


def digests_of(directory: Path) -> list[dict[str, Any]]:
    """What the training noted of every step."""
    path = directory / "artifacts" / DIGESTS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
