"""What the watcher of a RayJob and the stage in it tell each other through the object store.

    ray-jobs/<run>/<stage>/<request>/request.json             what to run; written by the watcher, first of all
                                     log/<attempt>/000042     lines of the stage's log, in order
                                     result/<attempt>.json    what the attempt ended with, last of all

The store is what both can reach: no connection between them has to live as long as a training, and what an attempt told
outlives its pods. An attempt is one start of the stage in the RayJob: a preempted one is followed by another. Attempts
sort by the time of their start. One that was taken down from outside leaves no result.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from components.runtime.contracts import Pointer, digest
from components.runtime.errors import InputError
from components.runtime.object_store import ObjectStore, key_of

FOLDER = "ray-jobs"
SHIP_SECONDS, SHIP_BYTES = 3.0, 64_000  # when lines go to the store
KEPT_BYTES = 8_000_000  # lines kept while the store is away; older ones are dropped


class Request(BaseModel):
    """What a stage is called with (`components.runtime.stage.execute`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run_id: str
    stage: str
    config: dict[str, Any]
    seed: int
    inputs: dict[str, Pointer]
    run: str | None = None
    config_class: str | None = None
    code: str = ""
    where: str = ""

    def digest(self) -> str:
        """The same for two watchers that want the same."""
        return digest(self.model_dump(mode="json"))[:32]


class Result(BaseModel):
    """`record` is the stage's summary.json, `failure` its failure.json; one of them is there."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    record: dict[str, Any] | None = None
    failure: dict[str, Any] | None = None


def folder(run_id: str, stage: str) -> str:
    """Where the requests of one stage of one run lie."""
    return f"{FOLDER}/{hashlib.sha256(run_id.encode()).hexdigest()[:16]}/{stage}"


def write_request(store: ObjectStore, request: Request) -> str:
    """Store the request in a place of its own. Returns the URI of that place."""
    place = f"{folder(request.run_id, request.stage)}/{new_name()}"
    store.put_bytes(f"{place}/request.json", request.model_dump_json().encode())
    return f"{store.uri.rstrip('/')}/{place}"


def read_request(store: ObjectStore, uri: str) -> Request:
    """Raises InputError when there is none at `uri`, or another version of Sparseline wrote it."""
    try:
        return Request.model_validate_json(store.get_bytes(f"{key_of(store, uri)}/request.json"))
    except FileNotFoundError as error:
        raise InputError(f"there is no request at {uri}: the run that made it has ended") from error
    except ValidationError as error:
        raise InputError(f"the request at {uri} is of another version of Sparseline: {error}") from error


def remove(store: ObjectStore, prefix: str) -> None:
    """Remove all below `prefix`. What another one removes at the same time is no error."""
    for key in store.keys(f"{prefix}/"):
        with suppress(FileNotFoundError):
            store.remove(key)


def new_name() -> str:
    """A name that sorts by time and that nobody else takes."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S%f}-{secrets.token_hex(2)}"


def write_result(store: ObjectStore, uri: str, attempt: str, result: Result) -> None:
    store.put_bytes(f"{key_of(store, uri)}/result/{attempt}.json", result.model_dump_json().encode())


def begin_attempt(store: ObjectStore, uri: str) -> bool:
    """Whether an attempt before has succeeded already. How earlier ones failed is forgotten: now this one counts."""
    prefix = f"{key_of(store, uri)}/result/"
    for key in store.keys(prefix):
        if Result.model_validate_json(store.get_bytes(key)).record is not None:
            return True
        store.remove(key)
    return False


def read_result(store: ObjectStore, uri: str) -> Result | None:
    """A success, or else how the newest attempt failed; None while there is neither."""
    prefix = f"{key_of(store, uri)}/result/"
    found = [Result.model_validate_json(store.get_bytes(key)) for key in sorted(store.keys(prefix))]
    return next((one for one in found if one.record is not None), found[-1] if found else None)


class LogWriter:
    """Ships lines to the store, a few seconds' worth at a time, in a thread of its own.

    While the store is away lines wait, up to KEPT_BYTES, and then the oldest are dropped and counted.
    """

    def __init__(self, store: ObjectStore, uri: str, attempt: str, seconds: float = SHIP_SECONDS) -> None:
        self._store, self._prefix, self._seconds = store, f"{key_of(store, uri)}/log/{attempt}", seconds
        self._lines: list[str] = []
        self._bytes = self._dropped = self._number = 0
        self._lock, self._wake, self._ended = threading.Lock(), threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def add(self, line: str) -> None:
        """One line, without its end."""
        with self._lock:
            self._lines.append(line)
            self._bytes += len(line)
            while self._bytes > KEPT_BYTES and len(self._lines) > 1:
                self._bytes -= len(self._lines.pop(0))
                self._dropped += 1
            if self._bytes >= SHIP_BYTES:
                self._wake.set()

    def close(self, seconds: float = 60.0) -> None:
        """Ship the rest, for at most `seconds`."""
        self._ended = True
        self._wake.set()
        self._thread.join(seconds)

    def _run(self) -> None:
        while not (self._ended and not self._lines):
            self._wake.wait(self._seconds)
            self._wake.clear()
            self._ship()

    def _ship(self) -> None:
        with self._lock:
            lines, dropped = self._lines, self._dropped
            self._lines, self._bytes, self._dropped = [], 0, 0
        if not lines:
            return
        if dropped:
            lines = [f"({dropped} lines were dropped while the object store was away)", *lines]
        try:
            self._store.put_bytes(f"{self._prefix}/{self._number:06d}", "\n".join(lines).encode())
            self._number += 1
        except Exception:  # whatever the store says: the stage goes on, and so do its lines once it is back
            with self._lock:
                self._lines = [*lines, *self._lines]
                self._bytes = sum(map(len, self._lines))
            time.sleep(1)


class LogReader:
    """Hands on the lines of all attempts, in order, and removes what it has handed on."""

    def __init__(self, store: ObjectStore, uri: str, show: Callable[[str], None]) -> None:
        self._store, self._prefix, self._show = store, f"{key_of(store, uri)}/log/", show

    def pump(self) -> int:
        """Show what is new. Returns how many lines that were. Raises InputError when the store is away."""
        shown = 0
        for key in sorted(self._store.keys(self._prefix)):
            try:
                lines = self._store.get_bytes(key).decode(errors="replace").split("\n")
            except FileNotFoundError:  # another watcher of the same RayJob was faster
                continue
            for line in lines:
                self._show(line)
            shown += len(lines)
            with suppress(FileNotFoundError):
                self._store.remove(key)
        return shown
