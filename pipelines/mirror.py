"""A whole run's way into MLflow: one parent run, one nested run per stage, the registry's champion."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.runtime.mlflow_sink import (
    PARENT_TAG,
    RUN_TAG,
    STAGE_TAG,
    StageMirror,
    find_parent,
    settings_experiment,
    start_run,
)
from components.runtime.registry import CHAMPION, ModelVersion, Registry, mlflow_client
from components.runtime.settings import Settings
from components.runtime.tracking import flatten
from pipelines.watch import RunWatch, StageView

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

INTERVAL_SECONDS = 2.0


class RunMirror:
    """Carries what the stages of one run record into MLflow."""

    def __init__(self, client: MlflowClient, settings: Settings, parent: str, experiment: str) -> None:
        self.client, self.settings, self.parent, self.experiment = client, settings, parent, experiment
        self.champion: ModelVersion | None = Registry(settings, client).alias(CHAMPION)
        self._stages: dict[str, StageMirror] = {}
        self._ended: set[str] = set()
        self._last = float("-inf")

    @staticmethod
    def connect(settings: Settings, profile: str, seed: int) -> RunMirror:
        """Connect to MLflow and open the run. Raises InputError when MLflow cannot be used."""
        client = mlflow_client(settings.tracking_uri)
        experiment = settings_experiment(client, settings)
        parent = find_parent(client, experiment, settings.run_id)
        client.set_tag(parent, "sparseline.profile", profile)
        client.log_param(parent, "seed", seed)
        return RunMirror(client, settings, parent, experiment)

    def _open(self, view: StageView) -> StageMirror:
        tags = {PARENT_TAG: self.parent, STAGE_TAG: view.name, RUN_TAG: self.settings.run_id}
        if view.state == "cached":
            tags["sparseline.cached_from"] = str(view.record["run_id"])
        run_id = start_run(self.client, self.experiment, view.name, tags)
        return StageMirror(self.client, self.settings, view.name, run_id, self.experiment)

    def pump(self, watch: RunWatch, *, all_now: bool = False) -> None:
        """Carry what is new, at most once an interval; the rest of a stage as soon as it has ended."""
        now = time.monotonic()
        due = all_now or now - self._last >= INTERVAL_SECONDS
        if due:
            self._last = now
        for view in watch.stages.values():
            if view.state == "waiting" or view.name in self._ended:
                continue
            ended = view.state != "running"
            if not (due or ended):
                continue
            if view.name not in self._stages:
                self._stages[view.name] = self._open(view)
            mirror = self._stages[view.name]
            if not ended:
                mirror.pump()
                continue
            self._ended.add(view.name)
            self._log_numbers(mirror.run_id, view.record.get("summary", {}))
            if view.state == "cached":  # its curves and models were recorded by the run that made them
                self.client.set_terminated(mirror.run_id, "FINISHED")
            else:
                mirror.finish("FINISHED" if view.state == "done" else "FAILED")

    def _log_numbers(self, run_id: str, values: Mapping[str, Any]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        numbers = [
            Metric(f"summary.{name}", float(value), now, 0)
            for name, value in flatten(values).items()
            if isinstance(value, (int, float))
        ]
        self.client.log_batch(run_id, metrics=numbers[:1000])

    def finish(self, watch: RunWatch, summary: Mapping[str, Any], files: Sequence[Path]) -> None:
        """Carry the rest, keep `files` with the parent run, and end it."""
        self.pump(watch, all_now=True)
        for name, mirror in self._stages.items():
            if name not in self._ended:  # it was killed before it could say how it ended
                mirror.finish("KILLED")
        top = {name: value for name, value in summary.items() if name not in ("stages", "gate")}
        self._log_numbers(self.parent, json.loads(json.dumps(top)))
        for path in files:
            if path.is_file():
                self.client.log_artifact(self.parent, str(path))
        self.client.set_terminated(self.parent, "FINISHED" if summary["status"] == "finished" else "FAILED")
