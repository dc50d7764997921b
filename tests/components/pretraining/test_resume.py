"""A pre-training that is stopped anywhere and started again ends bitwise where the undisturbed one ends."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

from components.pretraining import run as pretraining
from components.pretraining.config import PhaseConfig, PretrainingConfig
from components.runtime.contracts import Pointer
from components.runtime.object_store import open_store
from components.runtime.progress import Progress
from components.runtime.stage import StageContext
from components.runtime.tracking import Tracker, read_metrics
from model.checkpoint import load_model
from tests.components.knowledge_tasks import publish_knowledge_tasks

pytestmark = pytest.mark.slow

PHASE = PhaseConfig(steps=4, learning_rate=2e-3, warmup_steps=1, demonstration_tokens=200, document_tokens=100)
DENSE = PHASE.model_copy(update={"curriculum": 0.5})
CONFIG = PretrainingConfig(
    model="micro", dense=DENSE, warmup=PHASE, sparse=PHASE, validation_every=3, threads=1, state_seconds=0
)
STEPS = 3 * PHASE.steps


class Stopped(BaseException):
    pass


class StopsAfter(Progress):
    """Stops the stage as Ctrl-C would, after so many steps."""

    def __init__(self, steps):
        super().__init__()
        self.left = steps

    def update(self, *arguments):
        self.left -= 1
        if self.left < 0:
            raise Stopped


def learned(stage):
    """The curves, without what saving the states took."""
    curves = read_metrics(stage.tracker.directory)
    return {name: points for name, points in curves.items() if not name.startswith("states/")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("resume")


def context(folder, name, progress=None):
    for part in ("work", "records"):
        (folder / name / part).mkdir(parents=True, exist_ok=True)
    tracker = Tracker(folder / name / "records")
    store = open_store(str(folder / "store"))
    return StageContext("pretraining", name, 0, folder / name / "work", store, tracker, progress or Progress())


@pytest.fixture(scope="module")
def tasks(folder):
    return publish_knowledge_tasks(context(folder, "synthesis"))


def weights(folder, pointer):
    return load_model(context(folder, "read").fetch(pointer)).state_dict()


@pytest.fixture(scope="module")
def undisturbed(folder, tasks):
    made = context(folder, "undisturbed")
    pointer = pretraining.run(CONFIG, made, {"tasks": tasks}).outputs["checkpoint"]
    return weights(folder, pointer), learned(made)


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("steps", range(1, STEPS, 2))
def test_stopped_once(folder, tasks, undisturbed, steps):
    name = f"stopped-{steps}"
    with pytest.raises(Stopped):
        pretraining.run(CONFIG, context(folder, name, StopsAfter(steps)), {"tasks": tasks})
    again = context(folder, f"{name}-again")
    pointer = pretraining.run(CONFIG, again, {"tasks": tasks}).outputs["checkpoint"]
    expected_weights, expected_curves = undisturbed
    assert same(weights(folder, pointer), expected_weights)
    assert learned(again) == expected_curves
    assert again.store.keys("training-state") == []


def test_two_processes_go_on_together(folder, tasks):
    config = CONFIG.model_copy(update={"processes": 2})
    expected = pretraining.run(config, context(folder, "two"), {"tasks": tasks}).outputs["checkpoint"]
    with pytest.raises(Stopped):
        pretraining.run(config, context(folder, "two-stopped", StopsAfter(PHASE.steps + 2)), {"tasks": tasks})
    pointer = pretraining.run(config, context(folder, "two-again"), {"tasks": tasks}).outputs["checkpoint"]
    assert same(weights(folder, pointer), weights(folder, expected))


def test_a_changed_configuration_begins_anew(folder, tasks):
    with pytest.raises(Stopped):
        pretraining.run(CONFIG, context(folder, "before-change", StopsAfter(6)), {"tasks": tasks})
    changed = CONFIG.model_copy(update={"weight_decay": 0.1})
    with pytest.raises(Stopped):  # one step fewer than all: had it gone on, it would have ended
        pretraining.run(changed, context(folder, "changed", StopsAfter(STEPS - 1)), {"tasks": tasks})


def test_killed_while_it_saves(folder, tasks, undisturbed, tmp_path):
    """SIGKILL of the real program, twice, at moments of its own; the third try ends as if nothing had been."""
    config = tmp_path / "pretraining.yaml"
    values = {"config": CONFIG.model_dump(mode="json"), "inputs": {"tasks": tasks.model_dump()}, "seed": 0}
    config.write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "components.pretraining", "--config", str(config)]
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("SPARSELINE_")},
        "SPARSELINE_STORE": str(folder / "store"),
        "SPARSELINE_RUNS": str(tmp_path / "runs"),
        "SPARSELINE_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}",
    }
    for states in (2, 6):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        seen: set[str] = set()
        deadline = time.monotonic() + 120
        while len(seen) < states and time.monotonic() < deadline:
            assert process.poll() is None, "the stage ended before it was killed"
            seen |= {path.parent.name for path in (folder / "store").glob("training-state/**/state.pt")}
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=10)
        assert len(seen) >= states
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=True)
    printed = json.loads(done.stdout[done.stdout.index('{\n "outputs"') :])
    assert same(weights(folder, Pointer(**printed["outputs"]["checkpoint"])), undisturbed[0])
