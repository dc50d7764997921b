"""Publishing and fetching artifacts: data first, `manifest.json` last, every hash checked on read."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import ValidationError

from components.runtime.contracts import Manifest, ManifestFile, Pointer, digest
from components.runtime.errors import InputError, disk_errors
from components.runtime.object_store import ObjectStore, key_of

MANIFEST = "manifest.json"


def file_sha256(path: Path) -> str:
    """sha256 (hex) of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def publish(
    store: ObjectStore,
    kind: str,
    directory: Path,
    *,
    stage: str,
    run: dict[str, str],
    parents: Sequence[Pointer] = (),
    facts: dict[str, Any] | None = None,
) -> Pointer:
    """Copy `directory` into the store and return the pointer to it.

    The prefix is named by the run and the content, so publishing the same content again is harmless; a reader sees
    nothing before the manifest, which is written last. Raises InputError when the directory is empty.
    """
    paths = sorted(path for path in directory.rglob("*") if path.is_file() and path != directory / MANIFEST)
    if not paths:
        raise InputError(f"nothing to publish: {directory} holds no file")
    files = [
        ManifestFile(path=path.relative_to(directory).as_posix(), bytes=path.stat().st_size, sha256=file_sha256(path))
        for path in paths
    ]
    manifest = Manifest(
        kind=kind, stage=stage, files=files, parents=list(parents), run=dict(run), facts=dict(facts or {})
    )
    content = digest([file.model_dump() for file in files])[:16]
    prefix = f"{kind}/{run.get('sparseline', 'by-hand')}/{stage}-{content}"
    for path, file in zip(paths, files, strict=True):
        store.put_file(f"{prefix}/{file.path}", path)
    data = (manifest.model_dump_json(indent=1) + "\n").encode()
    store.put_bytes(f"{prefix}/{MANIFEST}", data)
    uri = f"{store.uri.rstrip('/')}/{prefix}"
    return Pointer(kind=cast(Literal["task-set"], kind), uri=uri, sha256=hashlib.sha256(data).hexdigest())


def read_manifest(store: ObjectStore, pointer: Pointer) -> Manifest:
    """The verified manifest behind `pointer`. Raises InputError when it is missing, damaged or of another kind."""
    try:
        data = store.get_bytes(f"{key_of(store, pointer.uri)}/{MANIFEST}")
    except FileNotFoundError as error:
        raise InputError(
            f"the {pointer.kind} {pointer.uri} is not in the store; run again with --no-cache to make it anew"
        ) from error
    if hashlib.sha256(data).hexdigest() != pointer.sha256:
        raise InputError(f"{pointer.uri}/{MANIFEST} is damaged: its sha256 is not the pointer's; publish it again")
    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError as error:
        raise InputError(f"{pointer.uri}/{MANIFEST} is no manifest of this version: {error}") from error
    if manifest.kind != pointer.kind:
        raise InputError(f"{pointer.uri} holds a {manifest.kind}, not a {pointer.kind}")
    return manifest


def fetch(store: ObjectStore, pointer: Pointer, target: Path) -> Path:
    """A verified copy of the artifact below `target`. Raises InputError for a missing or damaged file.

    The copy appears whole: it is downloaded beside its place and renamed when every hash was right.
    """
    manifest = read_manifest(store, pointer)
    place = target / pointer.sha256[:16]
    if place.is_dir() and not _damage(place, manifest):
        return place
    shutil.rmtree(place, ignore_errors=True)
    incomplete = target / f".incomplete-{pointer.sha256[:16]}"
    shutil.rmtree(incomplete, ignore_errors=True)
    try:
        with disk_errors(target):
            incomplete.mkdir(parents=True)
            for file in manifest.files:
                path = incomplete / file.path
                if not path.resolve().is_relative_to(incomplete.resolve()):
                    raise InputError(f"the manifest of {pointer.uri} names {file.path!r}, which lies outside of it")
                path.parent.mkdir(parents=True, exist_ok=True)
                try:
                    store.get_file(f"{key_of(store, pointer.uri)}/{file.path}", path)
                except FileNotFoundError as error:
                    raise InputError(
                        f"{pointer.uri}/{file.path} is missing from the store; publish the {pointer.kind} again "
                        "(sparseline run --no-cache)"
                    ) from error
            damage = _damage(incomplete, manifest)
            if damage:
                raise InputError(
                    f"{pointer.uri}/{damage} is damaged (its size or sha256 is not the manifest's); publish the "
                    f"{pointer.kind} again (sparseline run --no-cache)"
                )
            (incomplete / MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n")
            incomplete.rename(place)
    except BaseException:
        shutil.rmtree(incomplete, ignore_errors=True)
        raise
    return place


def _damage(directory: Path, manifest: Manifest) -> str | None:
    """The first file that is not as the manifest says, or None."""
    for file in manifest.files:
        path = directory / file.path
        if not path.is_file() or path.stat().st_size != file.bytes or file_sha256(path) != file.sha256:
            return file.path
    return None
