"""What a person sees of a run, from files as stages write them."""

import io
import json

import pytest
from rich.console import Console

from components.runtime.progress import Progress
from pipelines import display as display_module
from pipelines.display import LineDisplay, LiveDisplay, describe, duration
from pipelines.execute import TASKS
from pipelines.summary import summarise, table
from pipelines.watch import RunWatch


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "run-2").mkdir()
    return tmp_path / "run-2"


def stage(directory, name):
    folder = directory / "stages" / name
    folder.mkdir(parents=True)
    return folder, Progress(folder / "progress.jsonl")


def finish(folder, **fields):
    record = {
        "stage": folder.name,
        "run_id": folder.parents[1].name,
        "seconds": 5.0,
        "outputs": {},
        "summary": {},
        **fields,
    }
    (folder / "summary.json").write_text(json.dumps(record))
    return record


def shown(renderable, width=120):
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(renderable)
    return console.file.getvalue()


def test_durations_read_well():
    assert [duration(s) for s in (0.4, 59, 61, 3599.9, 7800)] == [
        "0 s",
        "59 s",
        "1 min 01 s",
        "1 h 00 min",
        "2 h 10 min",
    ]


def test_a_stage_waits_runs_and_ends(directory):
    watch = RunWatch(directory)
    watch.poll()
    assert watch.running is None
    folder, progress = stage(directory, "pretraining")
    progress.phase("sparse")
    progress.update(1, 40, {"loss": 3.25})
    kinds = [event["kind"] for _, event in watch.poll()]
    assert kinds == ["started", "phase", "step"]
    assert watch.running.name == "pretraining"
    assert describe(watch.running) == "sparse  1/40  loss 3.25"
    finish(folder, summary={"parameters": 10})
    watch.poll()
    view = watch.stages["pretraining"]
    assert (view.state, view.record["summary"]) == ("done", {"parameters": 10})
    assert watch.running is None


def test_a_failed_stage_tells_why(directory):
    folder, _ = stage(directory, "gate")
    (folder / "failure.json").write_text(json.dumps({"kind": "input", "exit_code": 2, "message": "no good\nreally"}))
    watch = RunWatch(directory)
    watch.poll()
    assert watch.failed.name == "gate"
    assert describe(watch.failed) == "no good"


def test_a_cached_stage_shows_the_records_of_the_run_that_made_them(directory):
    old = directory.parent / "run-1" / "stages" / "synthesis"
    old.mkdir(parents=True)
    record = finish(old, summary={"train_tasks": 60})
    (old / "metrics.jsonl").write_text('{"name": "n", "value": 1.0, "step": 0, "seconds": 0.0}\n')
    line = {"component": "comp-synthesis", "cached": True, "outputs": {"summary": str(old / "summary.json")}}
    (directory / TASKS).write_text(json.dumps(line) + "\n")
    watch = RunWatch(directory)
    watch.poll()
    view = watch.stages["synthesis"]
    assert (view.state, view.seconds, view.record) == ("cached", 0.0, record)
    assert (directory / "stages" / "synthesis" / "metrics.jsonl").is_file()


def test_the_live_table_shows_step_rate_left_and_from_the_second_minute_an_episode(directory):

    folder, _ = stage(directory, "post_training")
    progress = Progress(folder / "progress.jsonl", clock=iter([0.0, 0.0, 0.0, 0.0, 10.0, 10.0, 10.0]).__next__)
    progress.phase("GRPO")
    progress.update(1, 21, {"reward": 0.1})
    progress.update(6, 21, {"reward": 0.5})
    progress.episode("user: from ada\nassistant: submit(core)")
    watch = RunWatch(directory)
    watch.poll()
    live = LiveDisplay(None, "title")
    early = shown(live.render(watch, 59.0))
    assert "GRPO  6/21  0.5/s  30 s left  reward 0.5" in early
    assert "submit(core)" not in early
    late = shown(live.render(watch, 61.0))
    assert "submit(core)" in late
    assert "an episode just played (Post-training (RL))" in late


def test_a_log_gets_lines_and_an_episode_once_a_minute(directory, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(display_module.time, "monotonic", lambda: now[0])
    console = Console(file=io.StringIO(), width=200)
    lines = LineDisplay(console, "title")
    folder, progress = stage(directory, "post_training")
    watch = RunWatch(directory)
    for second in range(0, 181):
        now[0] = 1000.0 + second
        progress.episode(f"episode of second {second}")
        progress.update(second, 200)
        lines.update(watch, watch.poll())
    finish(folder)
    lines.update(watch, watch.poll())
    text = console.file.getvalue()
    episodes = [line.strip() for line in text.splitlines() if "episode of second" in line]
    assert episodes == ["episode of second 60", "episode of second 120", "episode of second 180"]
    assert 15 <= sum("/200" in line for line in text.splitlines()) <= 19  # every ten seconds
    assert text.splitlines()[-1].startswith("[post_training] done in")


def test_the_summary_lifts_the_evaluation_and_counts_what_ran(directory):
    for name, summary in (
        ("synthesis", {"train_tasks": 60}),
        ("evaluation", {"pass_at_1": {"before": {"macro": 0.25}, "after": {"macro": 0.75}}, "logprob_gap": 1e-6}),
        ("gate", {"verdict": "promoted", "rules": []}),
        ("serving", {"episode_ok": True}),
    ):
        folder, _ = stage(directory, name)
        finish(folder, summary=summary)
    watch = RunWatch(directory)
    watch.poll()
    made = summarise(
        watch, run_id="r", profile="micro", seed=3, wall_seconds=12.3456, peak_bytes=2_500_000_000, status="finished"
    )
    assert made["pass_at_1"]["after"]["macro"] == 0.75
    assert made["gate"]["verdict"] == "promoted"
    assert made["serving"] == {"episode_ok": True}
    assert (made["wall_seconds"], made["peak_rss_bytes"], made["seed"]) == (12.346, 2_500_000_000, 3)
    assert [stage["name"] for stage in made["stages"]] == ["synthesis", "evaluation", "gate", "serving"]
    text = shown(table(made))
    for words in ("pass@1 before 0.25, after 0.75", "verdict promoted", "episode ok True", "2.50 GB", "tasks 60"):
        assert words in text
