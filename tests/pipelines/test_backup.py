"""`sparseline backup` and `restore` on a real MLflow (SQLite and PostgreSQL), real stores and KFP's REST API."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from rich.console import Console

from components.runtime.contracts import Pointer
from components.runtime.errors import InputError
from components.runtime.object_store import DirectoryStore
from components.runtime.registry import CHAMPION, Registry, mlflow_client
from components.runtime.settings import Settings
from pipelines import backup as backup_module
from pipelines import database_copy
from pipelines.backup import BACKUPS, Backup, Places, backup, restore
from pipelines.run import open_or_embed

pytestmark = pytest.mark.slow  # MLflow makes its tables in seconds
POSTGRES = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))), None)
EMPTY = "empty.db"  # as MLflow makes it, which takes seconds
PARTS = {"gate/run/manifest.json": b'{"a": 1}', "checkpoint/run/model.safetensors": bytes(range(256)) * 300}


class Platform:
    """An MLflow with a run and a champion, a store, and the files that MLflow keeps: all in one folder."""

    def __init__(self, folder: Path, database: str = "") -> None:
        self.folder, self.runs, self.files = folder, folder / "runs", folder / "files"
        self.store = DirectoryStore(folder / "store")
        self.use(database or f"sqlite:///{folder / 'mlflow.db'}")

    def use(self, database: str) -> None:
        self.database = database
        environment = {
            "SPARSELINE_RUNS": str(self.runs),
            "SPARSELINE_STORE": self.store.uri,
            "MLFLOW_TRACKING_URI": database,
        }
        self.settings = Settings.read(environment)
        self.places = Places(self.settings, database, self.files, environment={})

    def work(self) -> None:
        """What people do: a run with its curve, a registered champion, artifacts."""
        client = mlflow_client(self.database)
        experiment = client.create_experiment("é sparseline")
        run = client.create_run(experiment, tags={"note": 'quotes " and \\ and\nlines'}).info.run_id
        for step, value in enumerate((0.1, 1 / 3, math.nan, math.inf)):
            client.log_metric(run, "reward", value, step=step)
        client.log_param(run, "seed", 3)
        for key, data in PARTS.items():
            self.store.put_bytes(key, data)
        pointer = Pointer(kind="checkpoint", uri=f"{self.store.uri}/checkpoint/run", sha256="ab" * 32)
        Registry(self.settings, client).promote(pointer)
        (self.files / "1" / "report").mkdir(parents=True)
        (self.files / "1" / "report" / "report.html").write_text("<p>a report</p>")

    def seen(self) -> dict[str, Any]:
        """What MLflow's own client, the store and the folder answer."""
        client = mlflow_client(self.database)
        experiments = client.search_experiments()
        runs = client.search_runs([one.experiment_id for one in experiments])
        version = Registry(self.settings, client).alias(CHAMPION)
        return {
            "experiments": sorted(one.name for one in experiments),
            "runs": [(one.info.run_id, one.info.start_time, one.data.params, one.data.tags) for one in runs],
            "curves": [repr(client.get_metric_history(one.info.run_id, "reward")) for one in runs],
            "champion": version,
            "objects": {key: self.store.get_bytes(key) for key in self.store.keys("")},
            "files": {str(path): path.read_bytes() for path in sorted(self.files.rglob("*")) if path.is_file()},
        }

    def wipe(self) -> None:
        """All is lost; a new MLflow starts on a database of its own."""
        for folder in (self.store.directory, self.files):
            shutil.rmtree(folder, ignore_errors=True)
        if self.database.startswith("sqlite"):
            Path(self.database.removeprefix("sqlite:///")).unlink()
        # another file: within one process MLflow keeps the lost one open
        fresh = self.folder / f"mlflow-{len(self.database)}.db"
        shutil.copy(self.folder / EMPTY, fresh)
        self.use(f"sqlite:///{fresh}")


def saved(platform: Platform, folder: Path, keep: int = 0) -> tuple[Backup, str]:
    console = Console(file=io.StringIO(), width=200)
    return backup(platform.places, str(folder), keep=keep, console=console), console.file.getvalue()  # type: ignore[attr-defined]


def restored(platform: Platform, folder: Path, backup_id: str = "") -> str:
    console = Console(file=io.StringIO(), width=200)
    restore(platform.places, str(folder), backup_id, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A platform that somebody worked with, made once; tests copy it."""
    folder = tmp_path_factory.mktemp("platform")
    mlflow_client(f"sqlite:///{folder / EMPTY}")
    shutil.copy(folder / EMPTY, folder / "mlflow.db")
    Platform(folder).work()
    return folder


@pytest.fixture
def platform(once: Path, tmp_path: Path) -> Platform:
    # copied back over the original, whose paths MLflow wrote down
    folder = tmp_path / "copy"
    shutil.copytree(once, folder)
    made = Platform(folder)
    with sa.create_engine(made.database).begin() as connection:  # the registered pointer names the store's folder
        statement = sa.text("UPDATE model_version_tags SET value = replace(value, :old, :new)")
        connection.execute(statement, {"old": (once / "store").as_uri(), "new": made.store.uri})
    return made


def test_what_was_wiped_comes_back_as_it_was(platform: Platform, tmp_path: Path) -> None:
    before = platform.seen()
    assert "nan" in before["curves"][0]
    assert before["champion"].version == "1"
    _, told = saved(platform, tmp_path / "backups")
    assert "2 objects, 1 files" in told
    platform.wipe()
    assert "restored" in restored(platform, tmp_path / "backups")
    assert platform.seen() == before


def test_a_second_backup_adds_only_what_is_new_and_the_first_can_still_be_restored(
    platform: Platform, tmp_path: Path
) -> None:
    first, _ = saved(platform, tmp_path / "backups")
    before, count = platform.seen(), len(list((tmp_path / "backups" / "objects").rglob("*")))
    platform.store.put_bytes("checkpoint/two/model", b"more")
    Registry(platform.settings).promote(
        Pointer(kind="checkpoint", uri=f"{platform.store.uri}/checkpoint/two", sha256="cd" * 32)
    )
    second, _ = saved(platform, tmp_path / "backups")
    files = [path for path in (tmp_path / "backups" / "objects").rglob("*") if path.is_file()]
    assert set(second.objects.values()) > set(first.objects.values())
    assert len(files) == len(set(first.objects.values())) + 1 + 1 + 2
    assert count
    platform.wipe()
    restored(platform, tmp_path / "backups", first.id)
    assert platform.seen() == before
    with pytest.raises(InputError, match="in use"):
        restored(platform, tmp_path / "backups")


def test_only_the_newest_backups_are_kept_whole(platform: Platform, tmp_path: Path) -> None:
    first, _ = saved(platform, tmp_path / "backups")
    platform.store.remove("gate/run/manifest.json")
    second, told = saved(platform, tmp_path / "backups", keep=1)
    assert f"forgotten: {first.id}" in told
    there = {path.name for path in (tmp_path / "backups" / "objects").rglob("*") if path.is_file()}
    assert there == {second.database, *second.objects.values(), *second.files.values()}
    before = platform.seen()
    platform.wipe()
    restored(platform, tmp_path / "backups")
    assert platform.seen() == before


def test_a_restore_that_was_broken_off_is_finished_by_the_same_command(
    platform: Platform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = platform.seen()
    saved(platform, tmp_path / "backups")
    platform.wipe()
    with monkeypatch.context() as patch:
        patch.setattr(backup_module.database_copy, "read_database", lambda *_: sys.exit("killed"))
        with pytest.raises(SystemExit):
            restored(platform, tmp_path / "backups")
    assert platform.seen()["champion"] is None  # nothing refers to what is there already
    restored(platform, tmp_path / "backups")
    assert platform.seen() == before


def test_a_backup_without_its_last_file_is_none(platform: Platform, tmp_path: Path) -> None:
    made, _ = saved(platform, tmp_path / "backups")
    (tmp_path / "backups" / BACKUPS / f"{made.id}.json").unlink()
    platform.wipe()
    with pytest.raises(InputError, match="holds no backup"):
        restored(platform, tmp_path / "backups")


def test_what_cannot_be_restored_is_named_and_the_database_stays_empty(platform: Platform, tmp_path: Path) -> None:
    made, _ = saved(platform, tmp_path / "backups")
    objects = DirectoryStore(tmp_path / "backups")
    wanted = made.objects["gate/run/manifest.json"]
    place = f"objects/{wanted[:2]}/{wanted}"
    platform.wipe()

    def told(backup_id: str = "") -> str:
        with pytest.raises(InputError) as error:
            restored(platform, tmp_path / "backups", backup_id)
        assert platform.seen()["champion"] is None
        return str(error.value)

    platform.store.put_bytes("gate/run/manifest.json", b"other")
    assert "is there with another content" in told()
    platform.store.remove("gate/run/manifest.json")
    data = objects.get_bytes(place)
    objects.put_bytes(place, data[:-1])
    assert "gate/run/manifest.json is damaged in the backup" in told()
    objects.remove(place)
    assert "lacks" in told()
    objects.put_bytes(place, data)
    assert f"holds no backup nonsense; there are: {made.id}" in told("nonsense")
    text = objects.get_bytes(f"{BACKUPS}{made.id}.json").decode()
    for name, changed, expected in (
        ("20990101-000000-0001", text.replace(made.store, "s3://elsewhere"), "is of the store s3://elsewhere"),
        ("20990101-000000-0002", text[:40], "damaged or of another version"),
        ("20990101-000000-0003", json.dumps({**json.loads(text), "files": {"../x": wanted}}), "a file outside of"),
    ):
        objects.put_bytes(f"{BACKUPS}{name}.json", changed.encode())
        assert expected in told(name)


def test_a_backup_of_another_schema_says_so(
    platform: Platform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with sa.create_engine(platform.database).begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '0123456789ab'"))
    path = tmp_path / "database"
    with monkeypatch.context() as patch:
        patch.setattr(database_copy, "connected", sa.create_engine)  # MLflow would refuse it
        database_copy.write_database(platform.database, path)
    other = f"sqlite:///{tmp_path / 'other.db'}"
    with pytest.raises(InputError, match="schema 0123456789ab, this MLflow makes"):
        database_copy.read_database(path, other)
    assert mlflow_client(other).search_experiments()[0].name == "Default"


def test_a_destination_in_the_store_itself_is_refused(platform: Platform) -> None:
    with pytest.raises(InputError, match="lies in the store itself"):
        saved(platform, platform.store.directory / "backups")


def test_a_database_of_another_kind_is_refused_without_its_password(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither sqlite") as told:
        database_copy.write_database("mysql://me:s3cret@host/mlflow", tmp_path / "x")
    assert "s3cret" not in str(told.value)


def test_mlflow_writes_on_while_it_is_copied(platform: Platform, tmp_path: Path) -> None:
    """What is written after the moment is not in the copy, and nothing waits for the copy to end."""
    with database_copy._one_moment(platform.database) as connection:
        client = mlflow_client(platform.database)
        run = client.create_run("0").info.run_id
        client.log_metric(run, "reward", 1.0)
        there = database_copy.tables(connection)
        ids = set(connection.execute(sa.select(there["runs"].c["run_uuid"])).scalars())
        assert ids
        assert run not in ids
    assert client.get_run(run).data.metrics == {"reward": 1.0}


@pytest.fixture(scope="module")
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real server with an empty database; its address."""
    if POSTGRES is None:
        pytest.skip("needs PostgreSQL's initdb and pg_ctl")
    pytest.importorskip("psycopg")
    folder = tmp_path_factory.mktemp("postgresql")
    user: dict[str, Any] = {}
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        folder.chmod(0o777)
        for parent in folder.parents:
            if parent.is_relative_to("/tmp") and parent != Path("/tmp"):
                parent.chmod(parent.stat().st_mode | 0o055)
        user = {"user": "nobody"}
    data, socket = folder / "data", folder

    def run(name: str, *arguments: str) -> None:
        done = subprocess.run(
            [str(POSTGRES.with_name(name)), *arguments], capture_output=True, text=True, cwd=folder, timeout=60, **user
        )
        assert done.returncode == 0, done.stdout + done.stderr

    run("initdb", "-D", str(data), "-U", "mlflow", "-A", "trust", "--no-sync")
    options = f"-k {socket} -h '' -F"
    run("pg_ctl", "-D", str(data), "-w", "-o", options, "-l", str(folder / "log"), "start")
    try:
        yield f"postgresql://mlflow@/postgres?host={socket}"
    finally:
        run("pg_ctl", "-D", str(data), "-m", "immediate", "-w", "stop")


def test_sqlite_is_carried_over_to_postgresql_and_back(platform: Platform, tmp_path: Path, postgresql: str) -> None:
    before = platform.seen()
    saved(platform, tmp_path / "backups")
    read_before = mlflow_client(platform.database).search_experiments()
    moved = Platform(tmp_path / "copy", postgresql)
    shutil.rmtree(moved.store.directory)
    restored(moved, tmp_path / "backups")
    assert moved.seen() == before
    client = mlflow_client(postgresql)  # its counters go on after what was read
    assert client.create_experiment("another") not in {one.experiment_id for one in read_before}
    client.log_metric(before["runs"][0][0], "reward", 2.0, step=9)
    before = moved.seen()
    saved(moved, tmp_path / "later")
    platform.wipe()
    restored(platform, tmp_path / "later")
    assert platform.seen() == before


def test_schedules_are_saved_and_made_again(
    platform: Platform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from pipelines.kfp_server import connect
    from pipelines.schedule import ScheduleOptions, existing, remove_schedule, set_schedule
    from tests.pipelines.test_submit_and_schedule import NIGHTLY, kfp_rest

    for name in ("KFP_ENDPOINT", "KFP_NAMESPACE", "KFP_TOKEN", "KFP_UI", "KFP_CA"):
        monkeypatch.delenv(name, raising=False)
    console = Console(file=io.StringIO(), width=200)
    with kfp_rest.serving() as (_, address):
        set_schedule(ScheduleOptions("nightly", **{**NIGHTLY, "endpoint": address}), console)
        platform.places = replace(platform.places, endpoint=address)
        made, told = saved(platform, tmp_path / "backups")
        assert "schedules: 1" in told
        assert made.schedules is not None
        (before,) = existing(connect(address), "nightly")
        remove_schedule("nightly", "", address, "", console)
        platform.wipe()
        platform.places = replace(platform.places, endpoint=address)
        restored(platform, tmp_path / "backups")
        (after,) = existing(connect(address), "nightly")
        for name in ("trigger", "pipeline_version_reference", "description", "max_concurrency", "no_catchup"):
            assert str(getattr(after, name)) == str(getattr(before, name)), name
        platform.wipe()
        assert "sparseline schedule set nightly --pipeline retraining --profile micro --cron" in restored(
            platform, tmp_path / "backups"
        )


def test_the_command_saves_and_restores_the_runs_of_this_machine(tmp_path: Path) -> None:
    """By the command line, with the embedded S3 store: into a folder where nothing was run yet."""
    runs, fresh, target = tmp_path / "runs", tmp_path / "fresh", tmp_path / "backups"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SPARSELINE", "MLFLOW"))}
    settings = Settings.read({"SPARSELINE_RUNS": str(runs)}).model_copy(update={"store": "", "model": "m"})
    with open_or_embed(settings) as (_, store):
        store.put_bytes("checkpoint/run/model", b"weights")
        pointer = Pointer(kind="checkpoint", uri=f"{store.uri}/checkpoint/run", sha256="ab" * 32)
    Registry(settings).promote(pointer)

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "pipelines.cli", *arguments],
            capture_output=True,
            text=True,
            env=environment,
            timeout=120,
        )

    done = call("backup", str(target), "--runs", str(runs))
    assert done.returncode == 0, done.stderr
    done = call("restore", str(target), "--runs", str(fresh))
    assert done.returncode == 0, done.stderr
    champion = Registry(settings.model_copy(update={"tracking_uri": f"sqlite:///{fresh / 'mlflow.db'}"})).alias(
        CHAMPION
    )
    assert champion is not None
    assert champion.pointer == pointer
    with open_or_embed(settings.model_copy(update={"runs": fresh})) as (_, store):
        assert store.get_bytes("checkpoint/run/model") == b"weights"
    done = call("restore", str(target), "--runs", str(runs))
    assert done.returncode == 2
    assert "is in use" in done.stderr
