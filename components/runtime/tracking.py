"""What a stage records: parameters, curves by step, artifacts.

The tracker appends to two files in the stage's folder and does nothing else, so that recording costs a training step
nothing: `metrics.jsonl` (one JSON a line: name, value, step, seconds), which reports are drawn from, and
`tracking.jsonl` (parameters, artifacts, models). `mlflow_sink` carries both into MLflow, in batches.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.runtime.contracts import Pointer

METRICS, EVENTS = "metrics.jsonl", "tracking.jsonl"


class Tracker:
    """Records of one stage, in `directory`. Without a directory nothing is kept (tests, notebooks)."""

    def __init__(self, directory: Path | None = None) -> None:
        self._start = time.monotonic()
        self.directory = directory
        self._metrics = (directory / METRICS).open("a", buffering=1) if directory else None
        self._events = (directory / EVENTS).open("a", buffering=1) if directory else None
        self._newest: dict[str, float] = {}

    def metric(self, name: str, value: float, step: int) -> None:
        """One point of the curve `name`."""
        self.metrics({name: value}, step)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """One point of each curve in `values` at `step`."""
        self._newest.update(values)
        if self._metrics:
            seconds = round(time.monotonic() - self._start, 3)
            lines = [
                json.dumps({"name": name, "value": float(value), "step": int(step), "seconds": seconds})
                for name, value in values.items()
            ]
            self._metrics.write("".join(line + "\n" for line in lines))

    def newest(self) -> dict[str, float]:
        """The last point of each curve. May be called from another thread."""
        return dict(self._newest)

    def history(self) -> str:
        """All points so far, to be kept with a training state."""
        return (self.directory / METRICS).read_text() if self.directory else ""

    def restore(self, history: str) -> None:
        """Begin with the points of an earlier try that was stopped; its seconds count on."""
        lines = history.splitlines()
        if self._metrics and lines:
            self._metrics.write("".join(line + "\n" for line in lines))
            self._start = time.monotonic() - json.loads(lines[-1])["seconds"]

    def _event(self, kind: str, **fields: Any) -> None:
        if self._events:
            self._events.write(json.dumps({"kind": kind, **fields}) + "\n")

    def parameters(self, values: Mapping[str, Any]) -> None:
        """Settings of the stage; nested mappings become dotted names."""
        self._event("parameters", values=flatten(values))

    def artifact(self, path: Path) -> None:
        """A file to keep with the run (a report, a picture). Copied now: the original may lie in the scratch folder."""
        if self.directory:
            kept = self.directory / "artifacts" / Path(path).name
            kept.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, kept)
            self._event("artifact", path=str(kept.resolve()))

    def model(self, pointer: Pointer, facts: Mapping[str, Any]) -> None:
        """A checkpoint that was published: becomes an MLflow LoggedModel with pointer and sha256."""
        self._event("model", pointer=pointer.model_dump(), facts=dict(facts))

    def trace(self, episode: Mapping[str, Any]) -> None:
        """A played episode with its parts and their times (`components.rollouts.loop.episode_trace`)."""
        self._event("trace", episode=dict(episode))

    def close(self) -> None:
        for stream in (self._metrics, self._events):
            if stream:
                stream.close()
        self._metrics = self._events = None


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` -> `{"a.b": 1}`; lists stay values."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def read_metrics(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Curves of a stage by name, as (step, value) in the order written. Empty when the stage recorded none."""
    curves: dict[str, list[tuple[int, float]]] = {}
    path = directory / METRICS
    if not path.is_file():
        return curves
    with path.open() as stream:
        for line in stream:
            if line.endswith("\n"):
                point = json.loads(line)
                curves.setdefault(point["name"], []).append((point["step"], point["value"]))
    return curves


class Lines:
    """Follows a file that grows: each call gives the complete lines that are new."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._position = 0

    def new(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        with self.path.open("rb") as stream:
            stream.seek(self._position)
            data = stream.read()
        end = data.rfind(b"\n") + 1
        self._position += end
        return [json.loads(line) for line in data[:end].splitlines()]
