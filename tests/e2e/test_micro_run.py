"""The whole compiled pipeline at the micro profile, as a user runs it: real stages, real store, real MLflow.

The micro model is too young to be better than itself, so the gate rejects it. An operator's promotion by hand then lets
the second run go the other way, to the serving check; what did not change comes from the cache.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from components.runtime.artifacts import MANIFEST
from components.runtime.registry import Registry, mlflow_client
from components.runtime.settings import Settings

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
SPARSELINE = [sys.executable, "-m", "pipelines.cli"]


def environment():
    # Nothing of the machine's own settings reaches these runs.
    drop = ("SPARSELINE_", "AWS_", "MLFLOW_")
    return {name: value for name, value in os.environ.items() if not name.startswith(drop)}


def sparseline(runs: Path, *arguments: str, profile="micro"):
    return subprocess.run(
        [*SPARSELINE, "run", "--profile", profile, "--runs", str(runs), *arguments],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=500,
    )


def summary_of(runs: Path, done: subprocess.CompletedProcess | None = None) -> dict:
    """The newest run's summary. With `done`, a run that wrote none fails with everything it said."""
    path = runs / "latest" / "summary.json"
    if done is not None:
        log = runs / "seaweedfs.log"
        store = log.read_text(errors="replace")[-2000:] if log.is_file() else ""
        assert path.is_file(), f"exit code {done.returncode}, no summary\n{done.stdout}\n{done.stderr}\n{store}"
    return json.loads(path.read_text())


def states(summary: dict) -> dict:
    return {stage["name"]: stage["state"] for stage in summary["stages"]}


def settings_of(runs: Path) -> Settings:
    return Settings.read({"SPARSELINE_RUNS": str(runs), "SPARSELINE_MODEL": "sparseline-micro"})


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def rejected(runs):
    done = sparseline(runs)
    return done, summary_of(runs, done)


@pytest.fixture(scope="module")
def accepted(runs, rejected):
    registry = Registry(settings_of(runs))
    registry.promote(registry.alias("candidate").pointer)
    done = sparseline(runs)
    return done, summary_of(runs, done)


def test_a_rejected_run_ends_by_name_with_exit_code_3(rejected):
    done, summary = rejected
    assert done.returncode == 3, done.stdout + done.stderr
    assert "rejected: the gate rejected s3://sparseline/checkpoint/" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert states(summary) == {
        "synthesis": "done",
        "pretraining": "done",
        "post_training": "done",
        "evaluation": "done",
        "champion": "done",
        "gate": "done",
        "rejected": "failed",
    }
    assert summary["gate"]["verdict"] == "rejected"
    assert any(not rule["holds"] for rule in summary["gate"]["rules"])


def test_the_summary_has_the_numbers_that_were_promised(accepted):
    _, summary = accepted
    assert summary["wall_seconds"] > 0
    assert 100e6 < summary["peak_rss_bytes"] < 6e9
    for stage in summary["stages"]:
        assert {"name", "seconds", "cached"} <= set(stage)
    for side in ("before", "after"):
        assert set(summary["pass_at_1"][side]) >= {"macro", "low", "high", "n"}
        assert side in summary["greedy"]
    assert set(summary["pass_at_1"]["difference"]) >= {"mean", "low", "high"}
    assert "kg_query" in summary["pass_at_1"]["families"]
    assert set(summary["ce"]) >= {"dense", "sparse", "window", "random"}
    assert isinstance(summary["indexer_recall"], float)
    assert 0 <= summary["logprob_gap"] < 1e-3
    assert summary["gate"]["verdict"] == "unchanged"
    assert isinstance(summary["serving"]["episode_ok"], bool)


def test_with_the_candidate_as_champion_the_run_reaches_the_serving_check(accepted):
    done, summary = accepted
    assert done.returncode == 0, done.stdout + done.stderr
    assert states(summary) == {
        "synthesis": "cached",
        "pretraining": "cached",
        "post_training": "cached",
        "evaluation": "cached",
        "champion": "done",
        "gate": "done",
        "promotion": "done",
        "serving": "done",
    }


def test_mlflow_has_the_hierarchy_the_curves_and_the_models(runs, accepted):
    settings = settings_of(runs)
    client = mlflow_client(settings.tracking_uri)
    (experiment,) = (e for e in client.search_experiments() if e.name == "sparseline")
    found = client.search_runs([experiment.experiment_id])
    parents = [run for run in found if run.data.tags["sparseline.stage"] == "pipeline"]
    assert len(parents) == 2
    assert {run.info.status for run in found} <= {"FINISHED", "FAILED"}
    for parent in parents:
        children = [run for run in found if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
        assert len(children) >= 7
        assert {"report.html", "summary.json", "pipeline.yaml"} == {
            file.path for file in client.list_artifacts(parent.info.run_id)
        }
    trained = [
        run
        for run in found
        if run.data.tags["sparseline.stage"] == "pretraining" and "sparseline.cached_from" not in run.data.tags
    ]
    assert len(trained) == 1
    curves = [name for name in trained[0].data.metrics if name.startswith("dense/") and "loss" in name]
    assert curves
    assert len(client.get_metric_history(trained[0].info.run_id, curves[0])) > 1
    traces = client.search_traces(locations=[experiment.experiment_id])
    assert {trace.info.tags["sparseline.stage"] for trace in traces} == {"post_training", "evaluation", "serving"}
    assert all({"reset", "turn 1", "verdict"} <= {span.name for span in trace.data.spans} for trace in traces)
    models = client.search_logged_models([experiment.experiment_id])
    assert sorted(model.tags["sparseline.stage"] for model in models) == ["post_training", "pretraining"]
    assert all(len(model.tags["sha256"]) == 64 for model in models)


@pytest.mark.parametrize("stage", ["synthesis", "pretraining", "post_training", "evaluation"])
def test_every_stage_has_its_page(runs, accepted, stage):
    page = (runs / "latest" / "stages" / stage / "artifacts" / f"{stage}.html").read_text()
    assert page.count("aria-label") == page.count("<svg") >= 2
    assert "<script" not in page


def test_the_report_stands_by_itself(runs, accepted):
    page = (runs / "latest" / "report.html").read_text()
    assert page.count("<svg") >= 5
    assert page.count("aria-label") == page.count("<svg")
    for outside in ("<script", "http://", "src=", "@import", "<link"):
        # The only addresses are the names of SVG's own vocabulary.
        assert outside not in page.replace("http://www.w3.org/", "")
    for plot in ("loss", "KL", "reward", "pass@1 before and after", "recall by depth"):
        assert plot in page


def test_a_step_of_its_post_training_is_executed_again(runs, accepted):
    """Step 2 has no record: it is reached from step 1, whose rollouts, weights and log-probabilities are compared."""

    run_id = accepted[1]["run_id"]  # "latest" may be another test's by now

    def replay(*arguments):
        command = [*SPARSELINE, "replay", run_id, *arguments, "--runs", str(runs)]
        return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=500)

    done = replay("2")
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("engine against learner", "rollouts", "weights after step 1", "weights after step 2"):
        assert f"same: {name}\n" in done.stdout
    assert "DIFFERS" not in done.stdout
    none = replay("9")
    assert none.returncode == 2
    assert "took 2 steps; step 9 is none of them" in none.stderr


def test_a_pipeline_without_one_of_its_tasks_fails(runs, accepted, tmp_path):
    compiled = yaml.safe_load((runs / "latest" / "pipeline.yaml").read_text())

    def run_without(task, *path):
        document = yaml.safe_load(yaml.safe_dump(compiled))
        node = document
        for key in path:
            node = node[key]
        del node["dag"]["tasks"][task]
        (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(document))
        return sparseline(runs, "--pipeline", str(tmp_path / "pipeline.yaml"))

    first = run_without("synthesis", "root")
    assert first.returncode == 1, first.stdout + first.stderr
    branch = next(
        name for name, one in compiled["components"].items() if "serving" in one.get("dag", {}).get("tasks", {})
    )
    last = run_without("serving", "components", branch)
    assert last.returncode == 1, last.stdout + last.stderr
    assert "ended without serving" in last.stdout
    assert states(summary_of(runs))["evaluation"] == "cached"


def start_and_wait_for(runs: Path, stage: str, *arguments: str):
    """A run that has reached `stage`, and every process below it."""
    before = set(runs.glob("2*"))
    process = subprocess.Popen(
        [*SPARSELINE, "run", "--profile", "micro", "--runs", str(runs), *arguments],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        assert process.poll() is None, "the run ended too early"
        (directory,) = set(runs.glob("2*")) - before or (None,)
        progress = directory and directory / "stages" / stage / "progress.jsonl"
        if progress and progress.is_file() and '"phase"' in progress.read_text():
            children = psutil.Process(process.pid).children(recursive=True)
            assert len(children) >= 4  # the store, the pipeline, a shell, the stage
            return process, directory, children
        time.sleep(0.1)
    raise AssertionError(f"{stage} did not start")


def ended_within(children, seconds: float) -> list[psutil.Process]:
    """Those that still run after `seconds`."""
    deadline = time.monotonic() + seconds
    alive = children
    while alive and time.monotonic() < deadline:
        alive = [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        time.sleep(0.05)
    return alive


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_child_survives_and_no_finished_stage_is_lost(runs, accepted, number):
    long = ("--set", "post_training.steps=5000")
    process, directory, children = start_and_wait_for(runs, "post_training", *long)
    process.send_signal(number)
    assert ended_within(children, 5.0) == []
    code = process.wait(timeout=30)
    if number == signal.SIGKILL:
        assert code == -signal.SIGKILL
    else:
        assert code == 130
        summary = json.loads((directory / "summary.json").read_text())
        assert summary["status"] == "stopped"
        assert states(summary)["pretraining"] == "cached"
    # The folder is free again, and everything that was finished is still there.
    process, _, children = start_and_wait_for(runs, "post_training", *long)
    process.kill()
    assert ended_within(children, 5.0) == []
    process.wait(timeout=30)


def test_a_result_that_is_gone_from_the_store_is_made_again(runs, accepted):
    """The cache never serves a pointer to nothing, and a champion that is gone is told.

    Last of those that share the runs folder: it takes the store's data away.
    """
    shutil.rmtree(runs / "seaweedfs")
    done = sparseline(runs, "--set", "post_training.steps=1")
    assert done.returncode == 2, done.stdout + done.stderr
    found = states(summary_of(runs))
    assert [found[name] for name in ("synthesis", "pretraining", "post_training", "evaluation")] == ["done"] * 4
    assert found["champion"] == "failed"
    assert "is not in the store" in done.stdout


def test_a_directory_holds_the_artifacts_and_a_damaged_base_checkpoint_is_refused(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    store = tmp_path / "store"
    done = sparseline(tmp_path / "runs", "--store", str(store), "--base", str(tmp_path / "base"))
    assert done.returncode == 2, done.stdout + done.stderr
    assert "pretraining: base checkpoint file://" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    kinds = [json.loads(manifest.read_text())["kind"] for manifest in store.rglob(MANIFEST)]
    assert sorted(kinds) == ["checkpoint", "task-set"]
    assert not (tmp_path / "runs" / "seaweedfs").exists()
