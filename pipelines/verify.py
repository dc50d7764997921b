"""`sparseline verify`: whether a model's evaluation and the gate's verdict on it can be computed again.

Finds the newest decision of the gate on the model in the store, checks the hashes of everything behind it, and then
what the evaluation claims. Exit code 0 when all holds, 3 when something does not.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError
from rich.console import Console

from components.evaluation.checks import Bundle, Check, check
from components.evaluation.gate import VERDICT_FILE, GateConfig
from components.evaluation.play import Player, read_items
from components.evaluation.report import ITEMS_FILE, EvaluationReport
from components.runtime import artifacts, errors
from components.runtime.contracts import GateVerdict, Manifest, Pointer
from components.runtime.errors import InputError
from components.runtime.object_store import ObjectStore, key_of
from components.runtime.registry import ModelVersion, Registry
from components.runtime.settings import Settings
from components.runtime.task_set import read_long_tasks, read_tasks
from pipelines.display import marked_table
from pipelines.run import only_run, open_or_embed

EXIT_UNVERIFIED = errors.EXIT_REJECTED


def verify(settings: Settings, model: str, *, sample: int, seed: int, console: Console, digest: str = "") -> int:
    """Verify `model` (an alias, a version number or a models:/ URI) and print the checks. Returns the exit code.

    `digest`: the sha256 that the checkpoint's manifest must have; empty: any. Raises InputError when there is no such
    model, the gate never decided on it, or an artifact is missing.
    """
    version, checks = verified(settings, model, sample=sample, seed=seed, console=console)
    if digest:
        found = version.pointer.sha256
        detail = f"asked for {digest[:12]}, the registry's version {version.version} is {found[:12]}"
        checks.insert(0, Check("digest", digest == found, detail))
    return 0 if show(checks, console) else EXIT_UNVERIFIED


def registered(settings: Settings, model: str) -> ModelVersion:
    """The version behind `model`. Raises InputError when there is no registry or no such version."""
    if not (settings.runs / "mlflow.db").is_file() and settings.tracking_uri.startswith("sqlite:///"):
        raise InputError(f"{settings.runs} holds no registry; run `sparseline run` first, or give --runs")
    registry = Registry(settings)
    return registry.resolve(registry.uri(model))


def verified(
    settings: Settings, model: str, *, sample: int, seed: int, console: Console
) -> tuple[ModelVersion, list[Check]]:
    """The version behind `model` and the checks on everything behind its checkpoint. Raises InputError as `verify`."""
    version = registered(settings, model)
    with only_run(settings.runs), open_or_embed(settings) as (_, store):
        console.print(f"{version.name} version {version.version}, checkpoint {version.pointer.uri}", soft_wrap=True)
        return version, list(checks_of(store, version.pointer, sample=sample, seed=seed))


def show(checks: list[Check], console: Console) -> bool:
    """Print the checks; whether all of them hold."""
    rows = [("ok" if found.holds else "FAILS", found.name, found.detail) for found in checks]
    console.print(marked_table("check", "numbers", rows))
    failed = [found.name for found in checks if not found.holds]
    console.print(f"does not verify: {', '.join(failed)}" if failed else "everything verifies", soft_wrap=True)
    return not failed


def decision(store: ObjectStore, checkpoint: Pointer) -> Pointer:
    """The newest decision of the gate on `checkpoint`; `unchanged` only where there is no other.

    Raises InputError when the gate never decided on it.
    """
    found: list[tuple[bool, str, Pointer]] = []
    for key in store.keys("gate/"):
        if not key.endswith(f"/{artifacts.MANIFEST}"):
            continue
        pointer = pointer_at(store, key.removesuffix(f"/{artifacts.MANIFEST}"))
        try:
            verdict = GateVerdict.model_validate_json(store.get_bytes(f"{key_of(store, pointer.uri)}/{VERDICT_FILE}"))
        except (ValueError, FileNotFoundError):
            continue
        if verdict.candidate.sha256 == checkpoint.sha256:
            run = key.split("/")[1]  # run ids sort by time
            found.append((verdict.verdict != "unchanged", run, pointer))
    if not found:
        raise InputError(
            f"the store holds no decision of the gate on {checkpoint.uri}; run `sparseline run` to make one"
        )
    return max(found, key=lambda one: one[:2])[2]


def pointer_at(store: ObjectStore, prefix: str) -> Pointer:
    data = store.get_bytes(f"{prefix}/{artifacts.MANIFEST}")
    return Pointer(kind="gate", uri=f"{store.uri.rstrip('/')}/{prefix}", sha256=hashlib.sha256(data).hexdigest())


def checks_of(store: ObjectStore, checkpoint: Pointer, *, sample: int, seed: int) -> Iterator[Check]:
    """The checks on everything behind the checkpoint's decision. What cannot be read ends them.

    Raises InputError when an artifact is missing or the decision was made by an older version.
    """
    gate = decision(store, checkpoint)
    with tempfile.TemporaryDirectory(prefix="sparseline-verify-") as folder:
        target = Path(folder)
        manifest = artifacts.read_manifest(store, gate)
        evaluation = next((parent for parent in manifest.parents if parent.kind == "evaluation"), None)
        if evaluation is None:
            raise InputError(f"{gate.uri} does not say which evaluation it decided on")
        places: dict[str, Path] = {}
        for name, pointer in (("gate", gate), ("evaluation", evaluation)):
            found, places[name] = fetched(store, name, pointer, target)
            yield found
            if not found.holds:
                return
        try:
            report = EvaluationReport.read(places["evaluation"])
            items = read_items(places["evaluation"] / ITEMS_FILE)
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{evaluation.uri} is no evaluation of this version: {error}; run again") from error
        pointers = {"before": report.before, "after": report.candidate}
        if report.champion is not None:
            pointers["champion"] = report.champion.pointer
        broken = False
        for name, pointer in (("task set", report.tasks), *pointers.items()):
            found, places[name] = fetched(store, f"checkpoint {name}" if name in pointers else name, pointer, target)
            yield found
            broken |= not found.holds
        verdict = GateVerdict.model_validate_json((places["gate"] / VERDICT_FILE).read_bytes())
        same = {checkpoint.sha256, report.candidate.sha256, verdict.candidate.sha256}
        yield Check("candidate", len(same) == 1, "registry, evaluation and gate name the same checkpoint"
                    if len(same) == 1 else "registry, evaluation and gate name different checkpoints")  # fmt: skip
        if broken:
            return
        tasks = [task for split in ("test", "validation") for task in read_tasks(places["task set"], split)]
        tasks += read_long_tasks(places["task set"])
        bundle = Bundle(
            report,
            items,
            verdict,
            gate_config(manifest),
            {task.id: task for task in tasks},
            {name: Player.load(name, places[name], pointer.sha256) for name, pointer in pointers.items()},
        )
        yield from check(bundle, sample=sample, seed=seed)


def gate_config(manifest: Manifest) -> GateConfig:
    """The bounds that the gate decided with. Raises InputError when another version of Sparseline decided."""
    try:
        return GateConfig.model_validate(manifest.facts.get("config", {}))
    except ValidationError as error:
        wrong = ", ".join(".".join(map(str, problem["loc"])) for problem in error.errors())
        raise InputError(
            f"the gate decided with settings that this version of Sparseline does not know ({wrong}); verify with the "
            "version that decided, or run again"
        ) from error


def fetched(store: ObjectStore, name: str, pointer: Pointer, target: Path) -> tuple[Check, Path]:
    """A copy with every hash checked. Raises InputError when the store has no such artifact."""
    if not store.exists(f"{key_of(store, pointer.uri)}/{artifacts.MANIFEST}"):
        raise InputError(f"the {pointer.kind} {pointer.uri} is not in the store; it cannot be verified without")
    try:
        place = artifacts.fetch(store, pointer, target)
        manifest = artifacts.read_manifest(store, pointer)
    except InputError as error:
        return Check(f"hashes: {name}", False, str(error)), target
    size = sum(file.bytes for file in manifest.files)
    detail = f"{len(manifest.files)} files, {size / 1e6:.2f} MB, manifest {pointer.sha256[:12]}"
    return Check(f"hashes: {name}", True, detail), place
