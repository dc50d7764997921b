"""What killed runs leave is removed before the next run; what finished and failed ones keep is not."""

import tempfile
from pathlib import Path

from components.post_training import ray_names
from pipelines.leftovers import sweep


def run_of(runs: Path, name: str, **stages: str) -> Path:
    """A run with a stage for each name, which has the file named; "" for a stage that was killed."""
    run = runs / name
    (run / "tmp" / "tmp.x").mkdir(parents=True)
    (run / "pipeline.log").touch()
    for stage, file in stages.items():
        work = run / "stages" / stage / "work" / "inputs"
        work.mkdir(parents=True)
        (work / ".incomplete-abc").mkdir()
        (run / "stages" / stage / "metrics.jsonl").touch()
        if file:
            (run / "stages" / stage / file).touch()
    return run


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_killed_runs_leave_records_only(tmp_path):
    run = run_of(tmp_path, "20261127-060712-25bd", killed="", failed="failure.json")
    (run / "stages" / "killed" / ".incomplete-summary.json").touch()
    (tmp_path / "kfp" / "cache").mkdir(parents=True)
    for name in (".kfp_cache_x.tmp", "kept.json"):
        (tmp_path / "kfp" / "cache" / name).touch()
    (tmp_path / "store" / "a").mkdir(parents=True)  # a folder that is no run
    (tmp_path / "latest").symlink_to(run.name, target_is_directory=True)
    sweep(tmp_path)
    assert files(run) == {
        *("pipeline.log", "stages", "stages/killed", "stages/killed/metrics.jsonl"),
        *("stages/failed", "stages/failed/metrics.jsonl", "stages/failed/failure.json"),
        *("stages/failed/work", "stages/failed/work/inputs", "stages/failed/work/inputs/.incomplete-abc"),
    }
    assert files(tmp_path / "kfp") == {"cache", "cache/kept.json"}
    assert (tmp_path / "store" / "a").is_dir()
    assert sweep(tmp_path) == []


def test_short_names_of_this_folder_go_and_others_stay(tmp_path, monkeypatch):
    place = Path(tempfile.mkdtemp(dir=tmp_path))
    monkeypatch.setattr(ray_names, "_place", lambda: place)
    (tmp_path / "runs").mkdir()
    gone = tmp_path / "runs" / "a" / "work" / "ray"
    gone.mkdir(parents=True)
    own, other = ray_names.short_name(gone), ray_names.short_name(tmp_path / "elsewhere")
    assert own.resolve() == gone
    sweep(tmp_path / "runs")
    assert list(place.iterdir()) == [other.parent]
