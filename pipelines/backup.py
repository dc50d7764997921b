"""`sparseline backup` and `restore`: MLflow's database, the object store and the schedules, at one moment.

The database is read first, in one transaction. What it refers to lies in the store already and never changes there, so
the store's objects, copied after, are those of that moment (and perhaps a few that nothing refers to yet). Objects are
kept by their sha256: a backup adds only what no earlier one holds. `backups/ID.json` is written last, and what has none
is no backup.

A restore puts objects and files first and the database last, in one transaction: until then nothing refers to them. It
overwrites nothing, and a restore that was killed is finished by the same command.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from rich.console import Console
from rich.progress import track

from components.runtime.artifacts import file_sha256
from components.runtime.errors import InputError
from components.runtime.object_store import ObjectStore, S3Store
from components.runtime.settings import Settings
from pipelines import database_copy
from pipelines.kfp_server import connect
from pipelines.run import only_run, open_or_embed
from pipelines.schedule import ScheduleOptions, commanded, existing, set_schedule

BACKUPS, OBJECTS = "backups/", "objects/"
ENDPOINT, ACCESS_KEY, SECRET_KEY = (
    "SPARSELINE_BACKUP_S3_ENDPOINT", "SPARSELINE_BACKUP_ACCESS_KEY_ID", "SPARSELINE_BACKUP_SECRET_ACCESS_KEY",
)  # fmt: skip


class Schedule(BaseModel):
    """A schedule that `sparseline schedule` made, as its command line."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    cron: str
    pipeline: str
    profile: str
    version: str
    service_account: str = ""


class Backup(BaseModel):
    """What a backup holds; every sha256 is the name of an object at the destination."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    made: datetime
    mlflow: str
    store: str
    database: str
    rows: dict[str, int]
    objects: dict[str, str]
    files: dict[str, str]
    schedules: list[Schedule] | None


@dataclass(frozen=True)
class Places:
    """What is saved or filled.

    database: URI of MLflow's database; files: folder of what MLflow keeps beside it (reports, pictures), or None;
    endpoint and namespace: of Kubeflow Pipelines, empty where there is none.
    """

    settings: Settings
    database: str
    files: Path | None = None
    endpoint: str = ""
    namespace: str = ""
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))


def open_destination(uri: str, environment: dict[str, str]) -> ObjectStore:
    """The store of the backups: a directory, or s3://BUCKET/PREFIX with its own credentials or those of the store."""
    own = {
        "SPARSELINE_STORE": uri,
        "SPARSELINE_S3_ENDPOINT": environment.get(ENDPOINT),
        "AWS_ACCESS_KEY_ID": environment.get(ACCESS_KEY),
        "AWS_SECRET_ACCESS_KEY": environment.get(SECRET_KEY),
    }
    store = Settings.read({**environment, **{name: value for name, value in own.items() if value}}).open_store()
    if isinstance(store, S3Store):
        store.ensure_bucket()
    return store


def backup(places: Places, destination: str, *, keep: int, console: Console) -> Backup:
    """Save everything to `destination`, and forget all but the newest `keep` backups there (0: none is forgotten).

    Raises InputError when the destination lies in the store itself, or a part cannot be reached.
    """
    target = open_destination(destination, places.environment)
    schedules = _schedules(places)
    with (
        only_run(places.settings.runs),
        open_or_embed(places.settings) as (_, store),
        tempfile.TemporaryDirectory() as folder,
    ):
        if f"{target.uri.rstrip('/')}/".startswith(f"{store.uri.rstrip('/')}/"):
            raise InputError(f"the destination {target.uri} lies in the store itself; choose another bucket or folder")
        held = {key.rsplit("/", 1)[1] for key in target.keys(OBJECTS)}
        path = Path(folder) / "object"
        rows = database_copy.write_database(places.database, path)
        database = _keep(target, path, held)
        keys = store.keys()
        objects = {}
        for key in track(keys, "objects of the store", console=console, transient=True):
            store.get_file(key, path)
            objects[key] = _keep(target, path, held)
        files = {name: _keep(target, file, held) for name, file in _files(places.files)}
    moment = datetime.now(UTC)
    made = Backup(
        id=f"{moment:%Y%m%d-%H%M%S-%f}",  # sorts by time, also within a second: the newest must never be forgotten
        made=moment,
        mlflow=installed("mlflow"),
        store=store.uri,
        database=database,
        rows=rows,
        objects=objects,
        files=files,
        schedules=schedules,
    )
    target.put_bytes(f"{BACKUPS}{made.id}.json", made.model_dump_json(indent=1).encode())
    _tell(f"backup {made.id} in {target.uri}", made, console)
    forgotten = forget(target, keep) if keep else []
    if forgotten:
        console.print(f"forgotten: {', '.join(forgotten)}", markup=False, highlight=False, soft_wrap=True)
    return made


def forget(target: ObjectStore, keep: int) -> list[str]:
    """Remove all but the newest `keep` backups, and the objects that none of those needs. Returns the removed ids."""
    names = target.keys(BACKUPS)  # an id begins with its time
    old, kept = names[:-keep], names[-keep:]
    for name in old:
        target.remove(name)
    needed = {name for one in kept for name in _needed(read(target, _id(one)))}
    for key in target.keys(OBJECTS):
        if key.rsplit("/", 1)[1] not in needed:
            target.remove(key)
    return [_id(name) for name in old]


def restore(places: Places, source: str, backup_id: str, console: Console) -> Backup:
    """Fill an empty database, the store, the files and the schedules from a backup (default: the newest).

    Raises InputError when the database is in use, the store is another one, something else lies where an object
    belongs, or the backup is damaged; then the database is as it was.
    """
    origin = open_destination(source, places.environment)
    found = read(origin, backup_id or newest(origin))
    with (
        only_run(places.settings.runs),
        open_or_embed(places.settings) as (_, store),
        tempfile.TemporaryDirectory() as folder,
    ):
        if store.uri != found.store:
            raise InputError(
                f"the backup {found.id} is of the store {found.store}, which its registered models name, and not of "
                f"{store.uri}; give that one"
            )
        engine = database_copy.connected(places.database)
        with engine.connect() as connection:
            database_copy.check_unused(connection, database_copy.tables(connection))
        engine.dispose()
        path = Path(folder) / "object"
        for key, sha256 in track(found.objects.items(), "objects of the store", console=console, transient=True):
            if store.exists(key):
                store.get_file(key, path)
                if file_sha256(path) != sha256:
                    raise InputError(f"{store.uri}/{key} is there with another content; move the store away first")
            else:
                _get(origin, sha256, path, f"{store.uri}/{key}")
                store.put_file(key, path)
        for name, sha256 in found.files.items():
            _put_file(origin, sha256, places.files, name)
        _get(origin, found.database, path, "the database")
        database_copy.read_database(path, places.database)
    for one in found.schedules or []:
        _set(one, places, console)
    _tell(f"restored {found.id} of {found.made:%Y-%m-%d %H:%M} UTC", found, console)
    return found


def newest(origin: ObjectStore) -> str:
    names = origin.keys(BACKUPS)
    if not names:
        raise InputError(f"{origin.uri} holds no backup; `sparseline backup` makes one")
    return _id(names[-1])


def read(origin: ObjectStore, backup_id: str) -> Backup:
    """What a backup says that it holds. Raises InputError when there is none of this id, or it cannot be read."""
    try:
        return Backup.model_validate_json(origin.get_bytes(f"{BACKUPS}{backup_id}.json"))
    except FileNotFoundError as error:
        there = ", ".join(_id(name) for name in origin.keys(BACKUPS)) or "none"
        raise InputError(f"{origin.uri} holds no backup {backup_id}; there are: {there}") from error
    except ValidationError as error:
        raise InputError(f"the backup {backup_id} in {origin.uri} is damaged or of another version") from error


def _id(name: str) -> str:
    return name.removeprefix(BACKUPS).removesuffix(".json")


def _needed(found: Backup) -> Iterator[str]:
    yield found.database
    yield from found.objects.values()
    yield from found.files.values()


def _place(sha256: str) -> str:
    return f"{OBJECTS}{sha256[:2]}/{sha256}"


def _keep(target: ObjectStore, path: Path, held: set[str]) -> str:
    """Put a file where its sha256 says, unless it is there. Returns the sha256."""
    sha256 = file_sha256(path)
    if sha256 not in held:
        target.put_file(_place(sha256), path)
        held.add(sha256)
    return sha256


def _get(origin: ObjectStore, sha256: str, path: Path, what: str) -> None:
    try:
        origin.get_file(_place(sha256), path)
    except FileNotFoundError as error:
        raise InputError(f"the backup in {origin.uri} lacks {what} ({sha256[:12]}); take another one") from error
    if file_sha256(path) != sha256:
        raise InputError(f"{what} is damaged in the backup in {origin.uri} ({sha256[:12]}); take another one")


def _files(folder: Path | None) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("*")) if folder else []:
        if path.is_file():
            yield path.relative_to(folder).as_posix(), path  # type: ignore[arg-type]


def _put_file(origin: ObjectStore, sha256: str, folder: Path | None, name: str) -> None:
    if folder is None:
        raise InputError(f"the backup holds files of MLflow ({name}, ...); give their folder by --files")
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise InputError(f"the backup names a file outside of {folder}: {name}")
    if path.exists():
        if file_sha256(path) != sha256:
            raise InputError(f"{path} is there with another content; move it away first")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.half")
    _get(origin, sha256, half, name)
    os.replace(half, path)


def _schedules(places: Places) -> list[Schedule] | None:
    if not places.endpoint:
        return None
    server = connect(places.endpoint, places.namespace)
    return [found for one in existing(server) if (found := _schedule(one)) is not None]


def _schedule(one: Any) -> Schedule | None:
    """The command line of a recurring run that we made; the description says what it runs."""
    command = commanded(one)
    if command is None or one.trigger is None or one.trigger.cron_schedule is None:
        return None
    pipeline, profile, version = command
    return Schedule(
        name=one.display_name,
        cron=one.trigger.cron_schedule.cron,
        pipeline=pipeline,
        profile=profile,
        version=version,
        service_account=one.service_account or "",
    )


def _set(one: Schedule, places: Places, console: Console) -> None:
    if not places.endpoint:
        command = f"sparseline schedule set {one.name} --pipeline {one.pipeline} --profile {one.profile}"
        console.print(f"no address of Kubeflow Pipelines; later: {command} --cron '{one.cron}'", markup=False)
        return
    options = ScheduleOptions(
        one.name, one.cron, one.pipeline, one.profile,
        endpoint=places.endpoint, namespace=places.namespace, service_account=one.service_account,
    )  # fmt: skip
    set_schedule(options, console)


def _tell(title: str, made: Backup, console: Console) -> None:
    schedules = "not looked at" if made.schedules is None else len(made.schedules)
    console.print(
        f"{title}: {sum(made.rows.values())} rows of MLflow {made.mlflow}, {len(made.objects)} objects, "
        f"{len(made.files)} files, schedules: {schedules}",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
