"""Progress and tracking files, and what is read back from them."""

import json
from datetime import datetime

import pytest

from components.runtime.progress import Progress, rate_and_left
from components.runtime.tracking import Lines, Tracker, flatten, read_metrics


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def events(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rate_and_time_left():
    assert rate_and_left(20, 100, 10.0) == (2.0, 40.0)
    assert rate_and_left(0, 100, 0.0) == (0.0, float("inf"))


def test_progress_counts_the_rate_from_the_first_step(tmp_path):
    clock = Clock()
    progress = Progress(tmp_path / "p", clock=clock)
    clock.now += 50  # loading: no part of the rate
    progress.update(1, 11, {"loss": 3.0})
    clock.now += 10
    progress.update(6, 11, {"loss": 2.0})
    last = events(tmp_path / "p")[-1]
    assert (last["step"], last["total"], last["rate"], last["left"]) == (6, 11, 0.5, 10.0)
    assert last["values"] == {"loss": 2.0}
    assert last["seconds"] == 60.0


def test_progress_is_thinned_but_keeps_the_last_step(tmp_path):
    clock = Clock()
    progress = Progress(tmp_path / "p", clock=clock)
    for step in range(1, 1001):
        clock.now += 0.001
        progress.update(step, 1000)
    steps = [event["step"] for event in events(tmp_path / "p")]
    assert len(steps) < 10
    assert steps[-1] == 1000


def test_phases_episodes_and_notes_are_kept(tmp_path):
    progress = Progress(tmp_path / "p")
    progress.phase("warm-up")
    progress.episode("user: hi\nassistant: ho")
    progress.note("all well")
    assert [event["kind"] for event in events(tmp_path / "p")] == ["phase", "episode", "note"]


def test_a_structured_log_gets_an_object_a_line(capsys):
    clock = Clock()
    progress = Progress(stage="pretraining", echo=True, run="r1", structured=True, clock=clock)
    progress.phase("dense")
    progress.update(5, 10, {"loss": 2.5, "kl": float("nan")})
    progress.update(6, 10, {"loss": 2.4})  # within the interval
    progress.note("a sentence")
    lines = [
        json.loads(line, parse_constant=lambda name: pytest.fail(name)) for line in capsys.readouterr().err.splitlines()
    ]
    assert [line.get("text") for line in lines] == ["dense", None, "a sentence"]
    assert all((line["run"], line["stage"], line["phase"]) == ("r1", "pretraining", "dense") for line in lines)
    assert (lines[1]["step"], lines[1]["total"], lines[1]["values"]) == (5, 10, {"loss": 2.5, "kl": "nan"})
    assert lines[2]["step"] == 6
    assert datetime.fromisoformat(lines[0]["time"]).tzinfo is not None


def test_a_log_gets_lines(tmp_path, capsys):
    clock = Clock()
    progress = Progress(stage="pretraining", echo=True, clock=clock)
    progress.phase("sparse")
    for step in range(1, 101):
        clock.now += 0.5
        progress.update(step, 100, {"loss": 0.25})
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "[pretraining] sparse"
    assert len(lines) == 7  # the phase, the first step, then one line in ten seconds, the last step
    assert lines[-1] == "[pretraining] sparse 100/100 (2/s, 0 s left) loss=0.25"


def test_curves_come_back_in_order(tmp_path):
    tracker = Tracker(tmp_path)
    tracker.metric("loss", 2.0, 0)
    tracker.metrics({"loss": 1.0, "kl": 0.5}, 1)
    tracker.parameters({"a": {"b": 1}, "c": [1, 2]})
    tracker.close()
    assert read_metrics(tmp_path) == {"loss": [(0, 2.0), (1, 1.0)], "kl": [(1, 0.5)]}
    point = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert set(point) == {"name", "value", "step", "seconds"}
    assert events(tmp_path / "tracking.jsonl") == [{"kind": "parameters", "values": {"a.b": 1, "c": [1, 2]}}]


def test_flatten():
    assert flatten({"a": {"b": {"c": 1}}, "d": 2}) == {"a.b.c": 1, "d": 2}


def test_lines_gives_only_whole_new_lines(tmp_path):
    path = tmp_path / "f"
    lines = Lines(path)
    assert lines.new() == []
    path.write_text('{"a": 1}\n{"a"')
    assert lines.new() == [{"a": 1}]
    with path.open("a") as stream:
        stream.write(": 2}\n")
    assert lines.new() == [{"a": 2}]
    assert lines.new() == []
