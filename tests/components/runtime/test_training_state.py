"""Training states: whole or not there, the newest two kept, found again by what the result follows from."""

import json

import pytest

from components.runtime.errors import InputError
from components.runtime.object_store import DirectoryStore
from components.runtime.training_state import TrainingState


def states(tmp_path, store=None, identity=None, seconds=10.0, clock=lambda: 0.0):
    store = store or DirectoryStore(tmp_path / "store")
    return TrainingState(store, "pretraining", identity or {"seed": 0}, tmp_path / "scratch", seconds, clock)


def writer(text):
    return lambda folder: (folder / "state.pt").write_text(text)


def saved(tmp_path, *orders):
    made = states(tmp_path)
    for order in orders:
        made.save(order, writer(f"state {order}"))
    made.wait()
    return made


def read(found):
    order, folder = found
    return order, (folder / "state.pt").read_text()


def test_the_newest_is_found_by_another_try_and_two_are_kept(tmp_path):
    assert states(tmp_path).latest(tmp_path / "work") is None
    made = saved(tmp_path, 3, 12, 1_000_002)
    assert read(states(tmp_path).latest(tmp_path / "work")) == (1_000_002, "state 1000002")
    kept = {key.split("/")[-2] for key in made.store.keys("training-state")}
    assert kept == {"00000012", "01000002"}


def test_another_identity_finds_nothing_and_removes_nothing(tmp_path):
    saved(tmp_path, 3)
    other = states(tmp_path, identity={"seed": 1})
    assert other.latest(tmp_path / "work") is None
    other.clear()
    assert read(states(tmp_path).latest(tmp_path / "work")) == (3, "state 3")


def test_a_finished_stage_leaves_nothing(tmp_path):
    made = saved(tmp_path, 3, 4)
    made.clear()
    assert made.store.keys("training-state") == []


@pytest.mark.parametrize("damage", ["changed", "missing", "no manifest"])
def test_a_damaged_state_is_passed_over(tmp_path, damage):
    made = saved(tmp_path, 3, 4)
    folder = made.store.directory / made.prefix / "00000004"
    if damage == "changed":
        (folder / "state.pt").write_text("state 5")
    else:
        (folder / {"missing": "state.pt", "no manifest": "manifest.json"}[damage]).unlink()
    assert read(states(tmp_path).latest(tmp_path / "work")) == (3, "state 3")


def test_a_state_of_another_version_is_refused_and_kept(tmp_path):
    made = saved(tmp_path, 3)
    manifest = made.store.directory / made.prefix / "00000003" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": "sparseline-training-state/0"}))
    with pytest.raises(InputError, match=r"format 'sparseline-training-state/0'.*remove .* to train from the start"):
        states(tmp_path).latest(tmp_path / "work")
    assert manifest.is_file()


def test_what_differs_from_the_nearest_state_is_told(tmp_path):
    for seed, steps in ((3, 90), (0, 40)):
        made = states(tmp_path, identity={"seed": seed, "config": {"steps": steps}, "layout": 2})
        made.save(3, writer("x"))
        made.wait()
    here = states(tmp_path, identity={"seed": 0, "config": {"steps": 90}, "layout": 2})
    assert here.latest(tmp_path / "work") is None
    why = here.why_anew()
    assert why.startswith(f"the training state {here.store.uri}/training-state/pretraining/")
    assert why.endswith(" is another training's: seed is 3 there, 0 here") or why.endswith(
        " is another training's: config.steps is 40 there, 90 here"
    )
    assert states(tmp_path / "empty").why_anew() == ""


@pytest.mark.parametrize("code", ["a", "b"])
def test_a_state_of_another_layout_is_refused_with_the_way_out(tmp_path, code):
    identity = {"seed": 0, "code": "a", "layout": 1}
    made = states(tmp_path, identity=identity)
    made.save(3, writer("old"))
    made.wait()
    with pytest.raises(InputError, match=r"layout 1, this one reads 2\); go on with that version, or remove it"):
        states(tmp_path, identity={**identity, "code": code, "layout": 2}).why_anew()
    assert read(states(tmp_path, identity=identity).latest(tmp_path / "work")) == (3, "old")
    # other sources with the same layout begin anew: a developer's next try
    assert "code is another" in states(tmp_path, identity={**identity, "code": "c"}).why_anew()


def test_a_state_that_was_put_in_the_place_of_another_is_refused(tmp_path):
    made = saved(tmp_path, 3)
    manifest = made.store.directory / made.prefix / "00000003" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "identity": {"seed": 7}}))
    with pytest.raises(InputError, match="is another training's: seed is 7 there, 0 here; remove it"):
        states(tmp_path).latest(tmp_path / "work")


def test_a_save_that_failed_is_told_by_the_next_one(tmp_path):
    def broken(folder):
        raise InputError("the disk is full")

    made = states(tmp_path)
    made.save(1, broken)
    with pytest.raises(InputError, match="disk is full"):
        made.save(2, writer("two"))
    assert made.latest(tmp_path / "work") is None


def test_the_interval_counts_from_the_last_save(tmp_path):
    now = 0.0
    made = states(tmp_path, clock=lambda: now)
    now = 9.9
    assert not made.due()
    now = 10.0
    assert made.due()
    made.save(1, writer("one"))
    assert not made.due()
