"""A post-training that is stopped anywhere and started again ends bitwise where the undisturbed one ends."""

import hashlib
import json

import pytest
import torch

from components.post_training import run as post_training
from components.post_training.config import PostTrainingConfig
from components.post_training.ledger import check_ledger, read_ledger
from components.runtime.errors import InputError
from components.runtime.object_store import open_store
from components.runtime.progress import Progress
from components.runtime.stage import StageContext
from components.runtime.tracking import Tracker, read_metrics
from model.checkpoint import load_model

pytestmark = pytest.mark.slow

VALUES = {
    **{"steps": 5, "prompts": 3, "group_size": 4, "mini_batches": 2, "validation_tasks": 2, "validation_every": 2},
    **{"turn_tokens": 6, "threads": 1, "learning_rate": 1e-3, "state_seconds": 0},
}


class Stopped(BaseException):
    pass


class StopsAfter(Progress):
    def __init__(self, steps):
        super().__init__()
        self.left = steps

    def update(self, *arguments):
        self.left -= 1
        if self.left < 0:
            raise Stopped


@pytest.fixture
def play(tmp_path, inputs, lot, monkeypatch):
    """Runs the stage; all runs of a test share a store. Rewards alternate, and a step has an even number of plays."""

    def run(name, progress=None, **values):
        folder = tmp_path / name
        for part in ("work", "records"):
            (folder / part).mkdir(parents=True)
        store, tracker = open_store(str(tmp_path / "store")), Tracker(folder / "records")
        stage = StageContext("post_training", "test", 0, folder / "work", store, tracker, progress or Progress())
        monkeypatch.setattr(post_training, "environment", lambda family: lot(family))
        result = post_training.run(PostTrainingConfig(**{**VALUES, **values}), stage, inputs(stage))
        assert store.keys("training-state") == []
        metrics = {n: p for n, p in read_metrics(folder / "records").items() if not n.endswith("_seconds")}
        ledger = read_ledger(folder / "records" / "artifacts" / "ledger.jsonl")
        return result.summary, ledger, metrics, load_model(folder / "work" / "checkpoint").state_dict()

    return run


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_stopped_once(play, steps):
    *expected, weights = play("undisturbed")
    with pytest.raises(Stopped):
        play("stopped", StopsAfter(steps))
    *found, same_weights = play("again")
    assert found == expected
    assert all(torch.equal(same_weights[name], weight) for name, weight in weights.items())


def test_stopped_with_groups_under_way(play, head):
    """One step off: the groups that were out are played again, and every one is trained or dropped once."""
    values = {"schedule": "one_step_off", "rollout_workers": 1}
    with pytest.raises(Stopped):
        play("stopped", StopsAfter(2), **values)
    summary, ledger, *_ = play("again", **values)
    counts = check_ledger(ledger)
    assert counts["again"] == 3
    assert counts["issued"] == counts["trained"] == 15
    assert max(record["step"] for record in ledger if record["event"] == "trained") == 4
    assert summary["rollouts"] == 5 * 3 * 4


def test_a_damaged_ledger_is_refused_with_the_way_out(play, tmp_path):
    with pytest.raises(Stopped):
        play("stopped", StopsAfter(2))
    for path in (tmp_path / "store").glob("training-state/**/state.pt"):
        state = torch.load(path, weights_only=True)
        state["ledger"][1]["group"] = 77
        torch.save(state, path)
        manifest = path.with_name("manifest.json")
        values = json.loads(manifest.read_text())
        values["files"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        manifest.write_text(json.dumps(values))
    with pytest.raises(
        InputError, match=r"the ledger in the training state .*: record 2 does not continue.*remove .* to begin anew"
    ):
        play("again")
