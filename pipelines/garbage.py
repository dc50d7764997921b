"""`sparseline gc`: what lies in this machine's store that nothing refers to any more.

An artifact is kept when a run in the runs folder made or used it, when a registered model version is it, comes from it
or was judged by it, and when one of these came from it. Nothing is removed without --delete.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.table import Table

from components.runtime.artifacts import MANIFEST
from components.runtime.contracts import Manifest, Pointer
from components.runtime.errors import InputError
from components.runtime.object_store import ObjectStore, S3Store
from components.runtime.registry import Registry
from components.runtime.settings import Settings
from pipelines.run import only_run, open_or_embed

KINDS = get_args(Pointer.model_fields["kind"].annotation)
STATES = "training-state"
UNUSED, HALF = "no run and no registered version refers to it", "its publishing was interrupted"
STATE = "training state: the same command would go on from it"


@dataclass(frozen=True)
class Found:
    """What lies below one prefix of the store. `bytes`: as its manifest says; None where there is none."""

    prefix: str
    keys: tuple[str, ...]
    bytes: int | None
    reason: str


def survey(store: ObjectStore, runs: Path, registry: Registry | None) -> tuple[list[Found], int]:
    """What could be removed, by prefix, and the number of artifacts that stay."""
    keys: dict[str, list[str]] = {}
    for key in store.keys(""):
        parts = key.split("/")
        if len(parts) > 3 and parts[0] in (*KINDS, STATES):
            keys.setdefault("/".join(parts[:3]), []).append(key)
    manifests = {
        prefix: Manifest.model_validate_json(store.get_bytes(f"{prefix}/{MANIFEST}"))
        for prefix, own in keys.items()
        if f"{prefix}/{MANIFEST}" in own
    }
    root = store.uri.rstrip("/") + "/"
    parents = {
        prefix: [pointer.uri.removeprefix(root) for pointer in manifest.parents]
        for prefix, manifest in manifests.items()
    }
    kept = {pointer.uri.removeprefix(root) for pointer in _of_runs(runs)}
    registered = {version.pointer.uri.removeprefix(root) for version in registry.versions()} if registry else set()
    # an evaluation, or a decision of the gate, stands below the version that it judged
    kept |= registered | {prefix for prefix in manifests if _above(prefix, parents) & registered}
    kept |= {above for prefix in kept for above in _above(prefix, parents)}
    removable = []
    for prefix, own in sorted(keys.items()):
        if prefix.startswith(f"{STATES}/"):
            removable.append(Found(prefix, tuple(own), None, STATE))
        elif prefix not in manifests:
            removable.append(Found(prefix, tuple(own), None, HALF))
        elif prefix not in kept:
            size = sum(file.bytes for file in manifests[prefix].files)
            removable.append(Found(prefix, tuple(own), size, UNUSED))
    return removable, len(kept & manifests.keys())


def collect_garbage(settings: Settings, delete: bool, console: Console) -> int:
    """Show what could go, and remove it where asked to.

    Raises InputError for a store that others may use: only its owner knows what refers to what lies there.
    """
    with only_run(settings.runs), open_or_embed(settings) as (_, store):
        if isinstance(store, S3Store) and settings.store:
            raise InputError(
                f"{store.uri} is not this machine's own store: the runs in {settings.runs} may not be all that use it; "
                "set a retention there (charts/sparseline has one)"
            )
        has_registry = (settings.runs / "mlflow.db").is_file() or not settings.tracking_uri.startswith("sqlite:///")
        removable, kept = survey(store, settings.runs, Registry(settings) if has_registry else None)
        made = Table(show_edge=False)
        made.add_column("artifact", overflow="fold")
        made.add_column("MB", justify="right", no_wrap=True)
        made.add_column("why")
        for one in removable:
            made.add_row(one.prefix, "" if one.bytes is None else f"{one.bytes / 1e6:.1f}", one.reason)
        if removable:
            console.print(made)
        size = sum(one.bytes or 0 for one in removable) / 1e6
        if not delete:
            console.print(f"{len(removable)} could go ({size:.1f} MB), {kept} stay; --delete removes them")
            return 0
        for one in removable:
            # the manifest first: without it the rest is nothing
            for key in sorted(one.keys, key=lambda key: not key.endswith(f"/{MANIFEST}")):
                store.remove(key)
        console.print(f"removed {len(removable)} ({size:.1f} MB), {kept} stay")
    return 0


def _of_runs(runs: Path) -> Iterable[Pointer]:
    for path in sorted(runs.glob("*/stages/*/summary.json")):
        for values in json.loads(path.read_text()).get("outputs", {}).values():
            yield Pointer(**values)


def _above(prefix: str, parents: dict[str, list[str]]) -> set[str]:
    """All that `prefix` came from."""
    seen: set[str] = set()
    waiting = list(parents.get(prefix, ()))
    while waiting:
        one = waiting.pop()
        if one not in seen:
            seen.add(one)
            waiting += parents.get(one, ())
    return seen
