"""Carries a stage's records (`metrics.jsonl`, `tracking.jsonl`) into MLflow, in batches.

One MLflow run per stage, nested under the run of the whole pipeline. Where KFP already made the run (MLFLOW_RUN_ID),
that one is resumed. `sparseline run` mirrors the records of all its stages from one process, so that no stage waits
for a database; a stage by itself (by hand, or in a pod) uses a `StageSink`.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.runtime.contracts import Pointer
from components.runtime.errors import InputError
from components.runtime.registry import CANDIDATE, Registry, mlflow_client
from components.runtime.settings import Settings
from components.runtime.tracking import EVENTS, METRICS, Lines

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

EXPERIMENT = "sparseline"
CANDIDATE_STAGE = "post_training"  # the stage whose checkpoint is what a run wants to promote
SPAN_TYPES = {"generation": "LLM", "tool": "TOOL", "environment": "CHAIN"}  # MLflow's names
BATCH = 1000  # metrics in one call: MLflow's limit
PARENT_TAG, STAGE_TAG, RUN_TAG, NAME_TAG = "mlflow.parentRunId", "sparseline.stage", "sparseline.run", "mlflow.runName"


def experiment_id(client: MlflowClient, name: str = EXPERIMENT, artifacts: Path | None = None) -> str:
    """The id of the experiment, made when there is none. `artifacts`: where it keeps files (a local store)."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    try:
        return str(client.create_experiment(name, artifact_location=artifacts.as_uri() if artifacts else None))
    except MlflowException:  # another process made it in between
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        return str(found.experiment_id)


def settings_experiment(client: MlflowClient, settings: Settings) -> str:
    """The experiment of these settings; files of a local SQLite tracking store lie beside it."""
    local = settings.tracking_uri.startswith("sqlite:")
    return experiment_id(client, artifacts=settings.runs / "mlflow-artifacts" if local else None)


def start_run(client: MlflowClient, experiment: str, name: str, tags: dict[str, str]) -> str:
    """A new MLflow run. Returns its id."""
    return str(client.create_run(experiment, tags={NAME_TAG: name, **tags}).info.run_id)


def find_parent(client: MlflowClient, experiment: str, run_id: str) -> str:
    """The MLflow run of the pipeline run `run_id`, made when there is none."""
    filter_string = f"tags.`{RUN_TAG}` = '{run_id}' and tags.`{STAGE_TAG}` = 'pipeline'"
    for run in client.search_runs([experiment], filter_string=filter_string, max_results=1):
        return str(run.info.run_id)
    return start_run(client, experiment, run_id, {RUN_TAG: run_id, STAGE_TAG: "pipeline"})


class StageMirror:
    """The records of one stage on their way into one MLflow run."""

    def __init__(
        self, client: MlflowClient, settings: Settings, stage: str, mlflow_run_id: str, experiment: str
    ) -> None:
        directory = settings.stage_directory(stage)
        self.client, self.settings, self.stage, self.run_id = client, settings, stage, mlflow_run_id
        self.experiment, self._traced = experiment, False
        self._metrics, self._events = Lines(directory / METRICS), Lines(directory / EVENTS)

    def pump(self) -> None:
        """Carry what is new."""
        from mlflow.entities import Metric

        points = [
            Metric(point["name"], point["value"], int(point["seconds"] * 1000), point["step"])
            for point in self._metrics.new()
        ]
        for start in range(0, len(points), BATCH):
            self.client.log_batch(self.run_id, metrics=points[start : start + BATCH])
        for event in self._events.new():
            if event["kind"] == "parameters":
                self._parameters(event["values"])
            elif event["kind"] == "artifact":
                self.client.log_artifact(self.run_id, event["path"])
            elif event["kind"] == "model":
                self._model(Pointer.model_validate(event["pointer"]), event["facts"])
            elif event["kind"] == "trace":
                self._trace(event["episode"])

    def _parameters(self, values: dict[str, Any]) -> None:
        from mlflow.entities import Param

        parameters = [Param(name, str(value)[:6000]) for name, value in values.items()]
        for start in range(0, len(parameters), 100):
            self.client.log_batch(self.run_id, params=parameters[start : start + 100])

    def _model(self, pointer: Pointer, facts: dict[str, Any]) -> None:
        from mlflow.entities import LoggedModelStatus

        model = self.client.create_logged_model(
            self.experiment,
            name=self.stage.replace("_", "-"),
            source_run_id=self.run_id,
            tags={"uri": pointer.uri, "sha256": pointer.sha256, STAGE_TAG: self.stage},
            params={name: str(value)[:250] for name, value in facts.items()},
        )
        self.client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
        if self.stage == CANDIDATE_STAGE:
            registry = Registry(self.settings, self.client)
            version = registry.register(pointer, run_id=self.run_id, model_id=model.model_id)
            registry.set_alias(CANDIDATE, version.version)

    def _trace(self, episode: dict[str, Any]) -> None:
        """An episode as an MLflow trace: a root span, and one for each turn, call, reset and verdict."""
        import mlflow

        mlflow.set_tracking_uri(self.settings.tracking_uri)  # traces go where the process says, not the client
        spans = episode["spans"]
        root = self.client.start_trace(
            episode["name"],
            span_type="AGENT",
            inputs=episode["inputs"],
            tags={STAGE_TAG: self.stage, **{f"sparseline.{name}": value for name, value in episode["tags"].items()}},
            experiment_id=self.experiment,
            start_time_ns=spans[0]["start"],
            run_id=self.run_id,
        )
        for span in spans:
            made = self.client.start_span(
                span["name"],
                root.trace_id,
                root.span_id,
                span_type=SPAN_TYPES[span["kind"]],
                inputs=span.get("inputs"),
                start_time_ns=span["start"],
            )
            self.client.end_span(root.trace_id, made.span_id, outputs=span.get("outputs"), end_time_ns=span["end"])
        self.client.end_trace(root.trace_id, outputs=episode["outputs"], end_time_ns=spans[-1]["end"])
        self._traced = True

    def finish(self, status: str) -> None:
        """Carry the rest and end the MLflow run: FINISHED, FAILED or KILLED."""
        self.carry_rest()
        self.client.set_terminated(self.run_id, status)

    def carry_rest(self) -> None:
        """Carry what is new, and wait until the traces have arrived."""
        self.pump()
        if self._traced:
            import mlflow

            mlflow.flush_trace_async_logging()


class StageSink:
    """The mirror of one stage inside its own process: a thread that pumps every few seconds."""

    INTERVAL_SECONDS = 3.0

    def __init__(self, settings: Settings, stage: str) -> None:
        from mlflow.exceptions import MlflowException

        client = mlflow_client(settings.tracking_uri)
        # A run that KFP made is resumed and left open: KFP ends it.
        self.resumed = bool(settings.mlflow_run_id)
        if self.resumed:
            try:
                run = client.get_run(settings.mlflow_run_id)
            except MlflowException as error:
                raise InputError(
                    f"MLFLOW_RUN_ID {settings.mlflow_run_id} does not exist at {settings.tracking_uri}"
                ) from error
            mlflow_run, experiment = run.info.run_id, run.info.experiment_id
            client.set_tag(mlflow_run, STAGE_TAG, stage)
            client.set_tag(mlflow_run, RUN_TAG, settings.run_id)
        else:
            experiment = settings_experiment(client, settings)
            parent = find_parent(client, experiment, settings.run_id)
            tags = {PARENT_TAG: parent, STAGE_TAG: stage, RUN_TAG: settings.run_id}
            mlflow_run = start_run(client, experiment, stage, tags)
        self._client = client
        self.mirror = StageMirror(client, settings, stage, mlflow_run, experiment)
        self._stop = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._pump, name="mlflow-sink", daemon=True)
        self._thread.start()

    def _pump(self) -> None:
        try:
            while not self._stop.wait(self.INTERVAL_SECONDS):
                self.mirror.pump()
        except Exception as error:  # told by close(): a thread cannot raise into the stage
            self._error = error

    def close(self, *, failed: bool) -> None:
        """Carry the rest. Raises the error that the thread met, unless the stage failed anyway."""
        self._stop.set()
        self._thread.join()
        if self._error is not None:
            if failed:
                return
            raise self._error
        if self.resumed:
            self.mirror.carry_rest()
        else:
            self.mirror.finish("FAILED" if failed else "FINISHED")
