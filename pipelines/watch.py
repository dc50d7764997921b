"""What a run's stages are doing, read from the files that they write."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from components.runtime.tracking import Lines
from pipelines.execute import TASKS
from pipelines.stages import STAGES


@dataclass
class StageView:
    """One stage as a person sees it. `record` is the stage's own summary.json once it is done."""

    name: str
    title: str
    state: str = "waiting"  # waiting, running, done, cached, failed
    started: float | None = None
    ended: float | None = None
    phase: str = ""
    step: int = 0
    total: int = 0
    rate: float = 0.0
    left: float | None = None
    values: dict[str, float] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    failure: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Wall time so far; a cached stage took none."""
        if self.started is None:
            return 0.0
        return (self.ended or time.monotonic()) - self.started


class RunWatch:
    """Follows a run directory. `poll` reads what is new and returns events for whoever prints lines.

    `stages`: those of the pipeline that runs there, in their order.
    """

    def __init__(self, directory: Path, stages: Iterable[str] = STAGES) -> None:
        self.directory = directory
        self.stages = {name: StageView(name, STAGES[name].title) for name in stages}
        self.episode: tuple[str, str] | None = None  # stage, text
        self.episodes = 0
        self._tasks = Lines(directory / TASKS)
        self._progress = {name: Lines(self.stage_directory(name) / "progress.jsonl") for name in self.stages}

    def stage_directory(self, name: str) -> Path:
        return self.directory / "stages" / name

    @property
    def running(self) -> StageView | None:
        return next((view for view in self.stages.values() if view.state == "running"), None)

    @property
    def failed(self) -> StageView | None:
        return next((view for view in self.stages.values() if view.state == "failed"), None)

    def poll(self) -> list[tuple[StageView, dict[str, Any]]]:
        """Read what is new: (stage, progress event) in order, `started` and `ended` events among them."""
        events: list[tuple[StageView, dict[str, Any]]] = []
        for view in self.stages.values():
            events += [(view, event) for event in self._poll_stage(view)]
        for line in self._tasks.new():
            name = line["component"].removeprefix("comp-").replace("-", "_")
            view = self.stages[name]
            if line["cached"] and view.state == "waiting":
                view.state = "cached"
                view.record = json.loads(Path(line["outputs"]["summary"]).read_text())
                self._link(name, view.record["run_id"])
                events.append((view, {"kind": "ended"}))
        return events

    def _poll_stage(self, view: StageView) -> list[dict[str, Any]]:
        directory = self.stage_directory(view.name)
        if view.state in ("done", "cached", "failed") or not directory.is_dir():
            return []
        events: list[dict[str, Any]] = []
        if view.state == "waiting":
            view.state, view.started = "running", time.monotonic()
            events.append({"kind": "started"})
        # Asked before the events are read: what was written before the end is then seen.
        done, failed = directory / "summary.json", directory / "failure.json"
        is_done, is_failed = done.is_file(), failed.is_file()
        for event in self._progress[view.name].new():
            self._take(view, event)
            events.append(event)
        if is_done or is_failed:
            view.ended = time.monotonic()
            view.state = "done" if is_done else "failed"
            if is_done:
                view.record = json.loads(done.read_text())
            else:
                view.failure = json.loads(failed.read_text())
            events.append({"kind": "ended"})
        return events

    def _take(self, view: StageView, event: dict[str, Any]) -> None:
        if event["kind"] == "phase":
            view.phase, view.step, view.total, view.left, view.values = event["name"], 0, 0, None, {}
        elif event["kind"] == "step":
            view.step, view.total, view.rate = event["step"], event["total"], event["rate"]
            view.left, view.values = event.get("left"), event["values"]
        elif event["kind"] == "episode":
            self.episode = (view.title, event["text"])
            self.episodes += 1

    def _link(self, name: str, run_id: str) -> None:
        """A cached stage's records lie in the run that made them; this run shows them by a link."""
        origin = self.directory.parent / run_id / "stages" / name
        place = self.stage_directory(name)
        if origin.is_dir() and not place.exists():
            place.parent.mkdir(exist_ok=True)
            place.symlink_to(Path("..") / ".." / run_id / "stages" / name, target_is_directory=True)
