"""Housekeeping on folders and stores that look like those of real runs: what is shown, what goes, what has to stay."""

import json
from io import StringIO

import pytest
from rich.console import Console

from components.runtime.artifacts import publish
from components.runtime.errors import InputError
from components.runtime.object_store import open_store
from components.runtime.registry import Registry
from components.runtime.settings import Settings
from pipelines import garbage, runs
from pipelines.run import only_run


def console():
    return Console(file=StringIO(), width=200)


def text(shown):
    return shown.file.getvalue()


def make_run(folder, name, seed, after=None, outputs=(), **settings):
    stage = folder / name / "stages" / "synthesis"
    stage.mkdir(parents=True)
    (stage / "summary.json").write_text(json.dumps({"outputs": {p.kind: p.model_dump() for p in outputs}}))
    configurations = {"post_training": {"steps": 70, **settings}}
    (folder / name / "configurations.json").write_text(json.dumps(configurations))
    if after is not None:
        passed = {side: {"macro": value} for side, value in (("before", 0.5), ("after", after))}
        summary = {
            **{"profile": "nano", "seed": seed, "status": "finished", "wall_seconds": 600.0, "peak_rss_bytes": 2e9},
            **{"pass_at_1": {**passed, "families": {"kg_query": {}}}, "stages": []},
        }
        (folder / name / "summary.json").write_text(json.dumps(summary))
    return folder / name


@pytest.fixture
def folder(tmp_path):
    make_run(tmp_path, "20260101-first", 0, after=0.75)
    make_run(tmp_path, "20260102-second", 1, after=0.9, steps=90)
    third = make_run(tmp_path, "20260103-third", 2)
    (third / "stages" / "pretraining").symlink_to("../../20260101-first/stages/synthesis")
    (tmp_path / "latest").symlink_to("20260103-third")
    return tmp_path


def test_list_and_compare(folder):
    shown = console()
    runs.list_runs(folder, shown)
    lines = text(shown).splitlines()
    assert ["0.500 to 0.750" in line for line in lines if "20260101-first" in line] == [True]
    assert ["no end" in line for line in lines if "20260103-third" in line] == [True]
    shown = console()
    runs.compare_runs(folder, "20260101", "20260102", shown)
    assert "+0.15" in text(shown)
    assert "post_training.steps: 70 | 90" in text(shown)
    assert "seed: 0 | 1" in text(shown)


@pytest.mark.parametrize("name, told", [("2026", "has 3 runs '2026'; these are"), ("nothing", "has no runs 'nothing'")])
def test_names_that_are_not_clear(folder, name, told):
    with pytest.raises(InputError, match=told):
        runs.named(folder, name)


def test_a_run_whose_records_another_one_shows_is_not_removed_alone(folder):
    with pytest.raises(InputError, match="the run 20260103-third shows stages of 20260101-first"):
        runs.remove_runs(folder, ["20260101"], console())
    assert (folder / "20260101-first").is_dir()
    runs.remove_runs(folder, ["20260101", "latest"], console())
    assert [run.id for run in runs.found(folder)] == ["20260102-second"]
    assert (folder / "latest").resolve().name == "20260102-second"


def test_nothing_is_removed_beside_a_run_that_goes_on(folder):
    with only_run(folder), pytest.raises(InputError, match="another sparseline"):
        runs.remove_runs(folder, ["20260102"], console())
    assert len(runs.found(folder)) == 3


@pytest.mark.slow
def test_what_a_run_or_a_registered_version_needs_stays(tmp_path):
    """Chains: tasks -> checkpoint -> evaluation. One is registered, one is a run's, one is nobody's."""
    store = open_store(str(tmp_path / "store"))
    settings = Settings.read({"SPARSELINE_RUNS": str(tmp_path), "SPARSELINE_STORE": str(tmp_path / "store")})
    chains = {}
    for name in ("registered", "run", "nobody"):
        parents, chains[name] = [], []
        for kind in ("task-set", "checkpoint", "evaluation"):
            content = tmp_path / "content"
            content.mkdir(exist_ok=True)
            (content / "file").write_text(f"{name} {kind}")
            pointer = publish(store, kind, content, stage=kind, run={"sparseline": name}, parents=parents)
            parents = [pointer]
            chains[name].append(pointer)
    Registry(settings).register(chains["registered"][1])
    make_run(tmp_path, "20260101-run", 0, outputs=chains["run"][1:2])
    store.put_bytes("checkpoint/half/pretraining-00/model.safetensors", b"half")
    store.put_bytes("training-state/pretraining/abc/00000001/state.pt", b"state")

    shown = console()
    garbage.collect_garbage(settings, False, shown)
    assert "6 could go" in text(shown)
    before = set(store.keys(""))
    garbage.collect_garbage(settings, True, console())
    left = set(store.keys(""))
    root = store.uri + "/"

    def whole(pointer):
        return f"{pointer.uri.removeprefix(root)}/manifest.json" in left

    assert [whole(pointer) for pointer in chains["registered"]] == [True, True, True]
    assert [whole(pointer) for pointer in chains["run"]] == [True, True, False]  # no run tells of its evaluation
    assert [whole(pointer) for pointer in chains["nobody"]] == [False, False, False]
    assert not [key for key in left if key.startswith(("checkpoint/half", "training-state"))]
    assert {key for key in before if key not in left} == {
        *(key for key in before if "/nobody/" in key or "/half/" in key or key.startswith("training-state")),
        *(key for key in before if key.startswith("evaluation/run/")),
    }
