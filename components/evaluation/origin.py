"""Where a run begins that does not begin from nothing: the checkpoint, what it was trained from, and a fresh seed.

python -m components.evaluation origin --config origin.yaml

The seed follows from an occasion and the champion: one occasion gives one seed, and two never give the same
tasks. The templates that were held out from the checkpoint's training stay held out: their seed is in its lineage.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from components.runtime.artifacts import read_manifest
from components.runtime.contracts import Pointer, digest
from components.runtime.errors import InputError
from components.runtime.object_store import ObjectStore
from components.runtime.registry import CHAMPION, Registry
from components.runtime.settings import Settings
from components.runtime.stage import StageContext, StageResult

UNKNOWN = -1  # the split seed of a checkpoint without a task set in its lineage
SEEDS = 1 << 31


class OriginConfig(BaseModel):
    """What the fresh seed follows from."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    occasion: str = Field(default="", description="any text; empty: the run's id, so that every run is another")


def run(config: OriginConfig, context: StageContext, inputs: dict[str, Pointer]) -> StageResult:
    """Stage `origin`. inputs: checkpoint, or the champion where there is none; outputs: checkpoint, trained_from.

    Raises InputError when there is neither.
    """
    registry = Registry(Settings.read())
    champion = registry.alias(CHAMPION)
    checkpoint = inputs.get("checkpoint") or (champion.pointer if champion else None)
    if checkpoint is None:
        raise InputError(
            f"the model {registry.name!r} has no champion yet; run the training pipeline of its profile first"
        )
    parent = trained_from(context.store, checkpoint)
    split_seed = split_seed_of(context.store, checkpoint)
    if split_seed == UNKNOWN:
        context.progress.note(
            f"which templates were held out from the training of {checkpoint.uri} is not known: "
            "the tasks of this run may be of templates that it was trained on"
        )
    seed = fresh_seed(config.occasion or context.run_id, champion.pointer.sha256 if champion else "")
    summary = {
        "model": registry.name,
        "champion": champion.pointer.model_dump() if champion else None,
        "champion_version": champion.version if champion else "",
        "fresh_seed": seed,
        "split_seed": split_seed,
    }
    return StageResult({"checkpoint": checkpoint, "trained_from": parent or checkpoint}, summary)


def fresh_seed(occasion: str, champion_sha256: str) -> int:
    """A seed below 2^31 for this occasion and champion."""
    return int(digest({"occasion": occasion, "champion": champion_sha256})[:16], 16) % SEEDS


def trained_from(store: ObjectStore, checkpoint: Pointer) -> Pointer | None:
    """The checkpoint that this one was trained from, or None."""
    parents = read_manifest(store, checkpoint).parents
    return next((parent for parent in parents if parent.kind == "checkpoint"), None)


def split_seed_of(store: ObjectStore, checkpoint: Pointer) -> int:
    """The seed that dealt templates to splits in the newest task set behind a checkpoint, or UNKNOWN."""
    manifest = read_manifest(store, checkpoint)
    for parent in manifest.parents:
        if parent.kind == "task-set":
            return int(read_manifest(store, parent).facts.get("split_seed", UNKNOWN))
    before = next((parent for parent in manifest.parents if parent.kind == "checkpoint"), None)
    return split_seed_of(store, before) if before else UNKNOWN
