"""Retraining, evaluation and synthesis at the micro profile, as a user runs them after a training run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from components.runtime.artifacts import fetch, read_manifest
from components.runtime.contracts import Pointer
from components.runtime.object_store import open_store
from components.runtime.registry import Registry
from components.runtime.settings import Settings
from components.runtime.task_set import read_tasks

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


def sparseline(folder, *arguments):
    drop = ("SPARSELINE_", "AWS_", "MLFLOW_")
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", "run", "--profile", "micro", "--runs", str(folder / "runs"),
         "--store", str(folder / "store"), *arguments],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith(drop)},
        capture_output=True,
        text=True,
        timeout=900,
    )  # fmt: skip
    latest = folder / "runs" / "latest"
    return done, latest.resolve() if latest.exists() else None


def record(run, stage):
    return json.loads((run / "stages" / stage / "summary.json").read_text())


def output(run, stage, name):
    return Pointer.model_validate(record(run, stage)["outputs"][name])


def states(run):
    return {stage["name"]: stage["state"] for stage in json.loads((run / "summary.json").read_text())["stages"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pipelines")


@pytest.fixture(scope="module")
def registry(folder):
    return Registry(Settings.read({"SPARSELINE_RUNS": str(folder / "runs"), "SPARSELINE_MODEL": "sparseline-micro"}))


@pytest.fixture(scope="module")
def trained(folder, registry):
    """A training run; its candidate, which the gate has no reason to accept, is made champion by hand."""
    done, run = sparseline(folder)
    assert done.returncode in (0, 3), done.stdout + done.stderr
    registry.promote(registry.alias("candidate").pointer)
    return run


@pytest.fixture(scope="module")
def retrained(folder, registry, trained):
    champion = registry.alias("champion")
    done, run = sparseline(folder, "--pipeline", "retraining")
    assert done.returncode in (0, 3), done.stdout + done.stderr
    return run, champion, done


@pytest.fixture
def store(folder):
    return open_store(str(folder / "store"))


def task_set(store, run, place):
    directory = fetch(store, output(run, "synthesis", "tasks"), place)
    return [task for split in ("train", "validation", "test") for task in read_tasks(directory, split)]


def test_without_a_champion_there_is_nothing_to_retrain(tmp_path):
    done, _ = sparseline(tmp_path, "--pipeline", "retraining")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "origin: the model 'sparseline-micro' has no champion yet" in done.stdout


def test_a_retraining_goes_on_from_the_champion_of_the_first_run(trained, retrained, store):
    run, champion, done = retrained
    assert champion.pointer == output(trained, "post_training", "checkpoint")
    candidate = read_manifest(store, output(run, "post_training", "checkpoint"))
    assert champion.pointer in candidate.parents
    assert "pretraining" not in states(run)
    verdict = record(run, "gate")
    assert verdict["summary"]["verdict"] == ("promoted" if done.returncode == 0 else "rejected")
    decided = json.loads((fetch(store, output(run, "gate", "verdict"), run / "read") / "verdict.json").read_text())
    assert decided["baseline"]["sha256"] == champion.pointer.sha256


def test_its_tasks_are_fresh_and_what_was_held_out_stays_held_out(trained, retrained, store, tmp_path):
    first, second = task_set(store, trained, tmp_path), task_set(store, retrained[0], tmp_path)
    assert len(first) > 100
    assert not {task.id for task in first} & {task.id for task in second}
    assert not {task.seed for task in first} & {task.seed for task in second}
    splits = {task.template: task.split for task in first}
    shared = [task for task in second if task.template in splits]
    assert len(shared) > 50
    assert all(splits[task.template] == task.split for task in shared)


def test_the_same_command_goes_on_and_another_seed_begins_anew(folder, registry, trained, retrained):
    run, champion, _ = retrained
    if registry.alias("champion") != champion:
        pytest.skip("it was promoted: another champion is another occasion")
    _, again = sparseline(folder, "--pipeline", "retraining")
    cached = {name for name, state in states(again).items() if state == "cached"}
    assert cached >= {"synthesis", "post_training", "evaluation", "champion", "gate"}
    seeds = {record(one, "origin")["summary"]["fresh_seed"] for one in (run, again)}
    assert len(seeds) == 1


def test_a_model_is_evaluated_beside_what_it_was_trained_from(folder, trained, retrained):
    done, run = sparseline(folder, "--pipeline", "evaluation", "--model", "champion", "--seed", "5")
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(states(run)) == {"origin", "synthesis", "evaluation", "champion"}
    evaluation = fetch(open_store(str(folder / "store")), output(run, "champion", "evaluation"), run / "read")
    report = json.loads((evaluation / "evaluation.json").read_text())
    origin = record(run, "origin")
    assert report["candidate"]["sha256"] == origin["outputs"]["checkpoint"]["sha256"]
    assert report["before"]["sha256"] == origin["outputs"]["trained_from"]["sha256"]
    assert report["before"]["sha256"] != report["candidate"]["sha256"]
    assert origin["summary"]["split_seed"] == 0  # of the training run


def test_a_task_set_is_made_alone(folder, trained):
    done, run = sparseline(folder, "--pipeline", "synthesis", "--seed", "0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(states(run)) == {"synthesis"}
    made, before = (output(one, "synthesis", "tasks").uri.split("/")[-1] for one in (run, trained))
    assert made == before  # named by its content: the seed is the training run's
