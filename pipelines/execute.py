"""Executes a compiled pipeline on this machine: kfp.local's SubprocessRunner, in a process of its own.

    python -m pipelines.execute RUN_DIRECTORY PIPELINE < request.json

The run directory holds `pipeline.yaml`; where it does not, the pipeline of this name is compiled from
`configurations.json` first. The request
is one line of JSON: {"arguments": {...}, "environment": {...}, "cache": bool}. It comes by standard input because it
holds the store's credentials. For every task, one line is added to `tasks.jsonl` in the
run directory: {"component", "cached", "outputs": {name: local path}}. What KFP and the stages print goes to our output.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

TASKS = "tasks.jsonl"


def artifact_paths(outputs: dict[str, Any]) -> dict[str, str]:
    """Local paths of the artifacts among a task's outputs."""
    return {name: value.path for name, value in outputs.items() if getattr(value, "path", None)}


def recording_cache(base: type, run_directory: Path) -> type:
    """KFP's local cache, telling of each hit and each result, and missing on results that are gone from the store."""

    class RecordingCache(base):
        def compute_key(self, component_name: str, *args: Any, arguments: dict[str, Any], **kwargs: Any) -> str:
            # By what they point to: two tasks may hand the same checkpoint on, each in a file of its own.
            named = {name: _pointed_to(value) for name, value in arguments.items()}
            key: str = super().compute_key(component_name, *args, arguments=named, **kwargs)
            self.components = {**getattr(self, "components", {}), key: component_name}
            return key

        def _record(self, key: str, outputs: dict[str, Any], cached: bool) -> None:
            line = {"component": self.components[key], "cached": cached, "outputs": artifact_paths(outputs)}
            with (run_directory / TASKS).open("a") as stream:
                stream.write(json.dumps(line) + "\n")

        def get(self, key: str) -> dict[str, Any] | None:
            outputs: dict[str, Any] | None = super().get(key)
            if outputs is not None and not _still_there(outputs):
                outputs = None
            if outputs is not None:
                self._record(key, outputs, cached=True)
            return outputs

        def put(self, key: str, outputs: dict[str, Any]) -> None:
            super().put(key, outputs)
            self._record(key, outputs, cached=False)

    return RecordingCache


def _pointed_to(value: Any) -> Any:
    metadata = getattr(value, "metadata", None)
    return {"sha256": metadata["sha256"]} if isinstance(metadata, dict) and "sha256" in metadata else value


def _still_there(outputs: dict[str, Any]) -> bool:
    """Whether every artifact that the outputs point to is whole in the store, its manifest as the pointer says."""
    from components.runtime.artifacts import read_manifest
    from components.runtime.errors import InputError
    from components.runtime.settings import Settings
    from components.runtime.stage import read_pointer

    store = Settings.read().open_store()
    for value in outputs.values():
        if not hasattr(value, "metadata") or "sha256" not in value.metadata:
            continue
        pointer = read_pointer(value)
        if pointer is None:
            return False
        try:
            manifest = read_manifest(store, pointer)
        except InputError:
            return False
        prefix = pointer.uri.removeprefix(store.uri.rstrip("/") + "/")
        if not all(store.exists(f"{prefix}/{file.path}") for file in manifest.files):
            return False
    return True


def main() -> None:
    run_directory = Path(sys.argv[1])
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*have no effect in the current local runner.*")
    from kfp import components, local
    from kfp.local import cache

    compiled = run_directory / "pipeline.yaml"
    if not compiled.is_file():
        from pipelines import catalogue

        configurations = json.loads((run_directory / "configurations.json").read_text())
        catalogue.named(sys.argv[2]).compile(configurations, compiled)
    # Everything slow is done by now; the request comes when the store is up.
    request = json.loads(sys.stdin.readline())
    os.environ.update(request["environment"])
    runs = run_directory.parent
    local.init(
        runner=local.SubprocessRunner(use_venv=False),
        # Not inside the run's own folder: cached results of one run are read by later ones.
        pipeline_root=str(runs / "kfp"),
        enable_caching=True,
        cache_root=str(runs / "kfp" / "cache") if request["cache"] else str(run_directory / "no-cache"),
    )
    cache.LocalCache = recording_cache(cache.LocalCache, run_directory)
    pipeline = components.load_component_from_file(str(compiled))
    try:
        pipeline(**request["arguments"])
    except RuntimeError as error:  # a task failed; the task has said why
        logging.error("%s", error)
        sys.exit(1)


if __name__ == "__main__":
    main()
