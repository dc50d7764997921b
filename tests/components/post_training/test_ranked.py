"""The stage on two processes: they play and learn as one does, and a dead one does not go unnoticed."""

import importlib

import psutil
import pytest
import torch

from components.post_training import run as post_training
from components.post_training.config import PostTrainingConfig
from components.post_training.ledger import check_ledger, read_ledger
from components.runtime.object_store import open_store
from components.runtime.progress import Progress
from components.runtime.stage import StageContext
from components.runtime.task_set import write_task_set
from components.runtime.tracking import Tracker
from model.checkpoint import load_model

pytestmark = pytest.mark.slow

# found by its entry point in every process; every second play of a process passes
FAMILY = """
from components.environments.kg_query import KnowledgeGraphQuery
from components.environments.protocol import Verdict


class Lot(KnowledgeGraphQuery):
    name = "lot"
    plays = 0

    def reset(self, task):
        episode, play = super().reset(task), self.plays
        self.plays += 1

        class Drawn:
            step, state_hash = episode.step, episode.state_hash

            def verdict(self):
                return Verdict(float(play % 2), "by lot")

        return Drawn()
"""


@pytest.fixture
def lot_tasks(tmp_path, monkeypatch):
    package = tmp_path / "package"
    (package / "lot-1.dist-info").mkdir(parents=True)
    (package / "lot_family.py").write_text(FAMILY)
    (package / "lot-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: lot\nVersion: 1\n")
    (package / "lot-1.dist-info" / "entry_points.txt").write_text("[sparseline.environments]\nlot = lot_family:Lot\n")
    monkeypatch.syspath_prepend(package)
    importlib.invalidate_caches()
    family = importlib.import_module("lot_family").Lot()
    templates = family.templates()[::40]
    write_task_set(
        tmp_path / "tasks",
        tasks=[family.generate(t, s, split) for split in ("train", "validation") for s, t in enumerate(templates)],
        long_tasks=[],
        demonstrations=[],
        documents=[],
        vocabulary=family.vocabulary(),
        battery={},
    )
    return tmp_path / "tasks"


SMALL = {
    **{"steps": 3, "prompts": 4, "group_size": 4, "mini_batches": 2, "validation_tasks": 3, "validation_every": 2},
    **{"turn_tokens": 6, "threads": 1, "learning_rate": 1e-3, "processes": 2},
}


class Kills(Progress):
    """Kills the other process after the first step."""

    def update(self, *_):
        for child in psutil.Process().children():
            if "spawn_main" in " ".join(child.cmdline()):
                child.kill()


@pytest.fixture
def play(tmp_path, lot_tasks, inputs):
    def run(name, progress=None, **values):
        folder = tmp_path / name
        for part in ("work", "records"):
            (folder / part).mkdir(parents=True)
        store, tracker = open_store(str(folder / "store")), Tracker(folder / "records")
        stage = StageContext("post_training", "test", 0, folder / "work", store, tracker, progress or Progress())
        given = inputs(stage) | {"tasks": stage.publish("task-set", lot_tasks)}
        result = post_training.run(PostTrainingConfig(**{**SMALL, **values}), stage, given)
        ledger = read_ledger(folder / "records" / "artifacts" / "ledger.jsonl")
        return result.summary, ledger, load_model(folder / "work" / "checkpoint").state_dict()

    return run


def same(first, second):
    return all(torch.equal(x, y) for x, y in zip(first.values(), second.values(), strict=True))


def test_two_processes_do_what_one_does_and_the_same_every_time(play, inputs):
    one, one_ledger, _ = play("one", processes=1)
    two, two_ledger, weights = play("two")
    _, again_ledger, again = play("again")
    assert same(weights, again)
    assert two_ledger == again_ledger
    assert not same(weights, load_model(inputs.folder / "checkpoint").state_dict())
    assert check_ledger(one_ledger) == check_ledger(two_ledger)
    assert (one["rollouts"], one["trained_rollouts"]) == (two["rollouts"], two["trained_rollouts"])
    assert two["logprob_gap"] < 1e-4


def test_a_dead_process_ends_the_stage_by_name_and_the_ledger_is_whole(play, tmp_path):
    with pytest.raises(RuntimeError, match=r"ended too early: rank 1 \(exit code -9\)"):
        play("killed", Kills())
    assert check_ledger(read_ledger(tmp_path / "killed" / "work" / "ledger.jsonl"))["trained"] >= 4
