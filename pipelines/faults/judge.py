"""What a disturbed run has to be afterwards: as the undisturbed one, whole, and with nothing left behind."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

from components.post_training.ledger import check_ledger, read_ledger
from components.runtime.artifacts import MANIFEST, fetch, read_manifest
from components.runtime.contracts import Manifest, Pointer
from components.runtime.object_store import DirectoryStore, ObjectStore
from pipelines.faults.case import Case, what
from pipelines.leftovers import leftovers

COMPARED = ("task-set", "checkpoint")  # kinds whose files hold nothing of the run that made them
NUMBERS = ("pass_at_1", "greedy", "ce", "indexer_recall")


def made(case: Case) -> dict[str, Any]:
    """The hashes of the files that the newest run refers to, its numbers and its ledger's counts.

    Raises what is wrong with any artifact in the store, whichever try published it, and with the ledger.
    """
    found: dict[str, Any] = {}
    run = (case.runs / "latest").resolve()
    with case.opened() as (_, store), tempfile.TemporaryDirectory() as place:
        for path in sorted(run.glob("stages/*/summary.json")):
            for name, values in json.loads(path.read_text())["outputs"].items():
                pointer = Pointer(**values)
                manifest = read_manifest(store, pointer)
                if pointer.kind in COMPARED:
                    found[f"{path.parent.name}/{name}"] = {file.path: file.sha256 for file in manifest.files}
        check_whole(store, Path(place))
        if store.keys("training-state"):
            raise ValueError("a training state was left")
        if isinstance(store, DirectoryStore) and (half := list(store.directory.rglob(".incomplete-*"))):
            raise ValueError(f"{len(half)} half-written objects were left in the store")
    summary = json.loads((run / "summary.json").read_text())
    found["numbers"] = {name: summary[name] for name in NUMBERS}
    found["ledger"] = check_ledger(read_ledger(run / "stages" / "post_training" / "artifacts" / "ledger.jsonl"))
    return found


def check_whole(store: ObjectStore, place: Path) -> None:
    """Fetch every artifact that a manifest announces. Raises InputError for one that is not whole."""
    for key in store.keys(""):
        if key.endswith(f"/{MANIFEST}") and not key.startswith("training-state/"):
            data = store.get_bytes(key)
            uri = f"{store.uri.rstrip('/')}/{key.removesuffix('/' + MANIFEST)}"
            kind = Manifest.model_validate_json(data).kind
            sha256 = hashlib.sha256(data).hexdigest()
            fetch(store, Pointer.model_validate({"kind": kind, "uri": uri, "sha256": sha256}), place)


def unlike(expected: dict[str, Any], case: Case) -> list[str]:
    """What is not as the undisturbed run made it."""
    try:
        got = made(case)
    except Exception as error:
        return [f"{type(error).__name__}: {error}"]
    names = sorted(name for name in {*expected, *got} if got.get(name) != expected.get(name))
    return [f"not what the undisturbed run made: {', '.join(names)}"] if names else []


def left_behind(case: Case) -> list[str]:
    """Processes and files that are still there after the command ended in order."""
    found = [f"process {what(process)}" for process in case.remaining()]
    found += [str(path.relative_to(case.folder)) for path in leftovers(case.runs)]
    for place in (case.temporary, case.shared):
        found += [str(path.relative_to(case.folder)) for path in sorted(place.iterdir())]
    return [f"left behind: {', '.join(found)}"] if found else []


def untold(code: int, text: str) -> list[str]:
    """What is wrong with what the command said as it stopped with this exit code."""
    if code in ENDED_OR_KILLED:
        return []
    problems = []
    if code not in (1, 2):
        problems.append(f"the command stopped with exit code {code}")
    if "Traceback" in text:
        problems.append(f"a traceback reached the user: {text.strip().splitlines()[-1]}")
    elif len(text.strip()) < 20:
        problems.append("the command stopped without a message")
    return problems


ENDED_OR_KILLED = (0, 3, -9)
