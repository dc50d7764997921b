"""Training state of a stage that can be stopped at any moment: saved beside the training, found again by the next try.

It is not the published checkpoint. It lies under `training-state/<stage>/<identity>/<order>/` in the store, where the
identity is the hash of all that the result follows from (configuration, seed, inputs, sources, layout of the state), so
a changed stage never goes on from another's state: it begins anew beside it, and tells what is different. The files go
first and the manifest with their hashes last; the newest two are kept, so that a kill while one is written, or a
damaged one, costs one interval and not the training.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from components.runtime.artifacts import MANIFEST, file_sha256
from components.runtime.contracts import digest
from components.runtime.errors import InputError
from components.runtime.object_store import ObjectStore
from components.runtime.tracking import flatten

FORMAT = "sparseline-training-state/2"
KEPT = 2
LAYOUT = "layout"  # key of an identity: the number of the state's own layout, which the stage counts
WAITED_SECONDS, BACKGROUND_SECONDS = "states/waited_seconds", "states/background_seconds"  # curves of a stage
_SHOWN = 5  # differences that are told


class TrainingState:
    """States of one stage. Saving runs in a thread of its own; one save at a time."""

    def __init__(
        self,
        store: ObjectStore,
        stage: str,
        identity: Mapping[str, Any],
        scratch: Path,
        interval_seconds: float,
        clock: Callable[[], float] = time.monotonic,
        saved: Callable[[int], None] = lambda order: None,
    ) -> None:
        """`saved` is called with the order of each state that is whole, in the thread that saved it."""
        self.store, self.scratch, self.interval, self.clock, self.saved = store, scratch, interval_seconds, clock, saved
        self.waited_seconds = self.background_seconds = 0.0  # of training for saving, and of saving beside training
        self._asked: float | None = None
        self.identity = json.loads(json.dumps(dict(identity)))  # as a manifest gives it back
        self.folder = f"training-state/{stage}"
        self.prefix = f"{self.folder}/{digest(self.identity)[:32]}"
        self._saved_at = clock()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def due(self) -> bool:
        """Whether the interval since the last save (or the start) is over. If so, the time until `save` counts."""
        now = self.clock()
        self._asked = now if now - self._saved_at >= self.interval else None
        return self._asked is not None

    def save(self, order: int, write: Callable[[Path], None]) -> None:
        """Store what `write` puts into the folder it is given. `order` grows with every save of the training.

        `write` runs in the background, so it must hold copies of what training changes. Waits for the save before this
        one; raises the error with which that one ended.
        """
        self.wait()
        self._saved_at = self.clock()
        self._thread = threading.Thread(target=self._run, args=(order, write), name="training state", daemon=True)
        self._thread.start()
        if self._asked is not None:
            self.waited_seconds += self.clock() - self._asked
            self._asked = None

    def wait(self) -> None:
        """Wait for a save that is under way. Raises the error with which it ended."""
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._error:
            error, self._error = self._error, None
            raise error

    def _run(self, order: int, write: Callable[[Path], None]) -> None:
        started = self.clock()
        try:
            self._save(order, write)
            self.saved(order)
        except BaseException as error:
            self._error = error  # told by the next `wait`, in the thread of the stage
        self.background_seconds += self.clock() - started

    def _save(self, order: int, write: Callable[[Path], None]) -> None:
        folder = self.scratch / f"state-{order:08d}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write(folder)
        place = f"{self.prefix}/{order:08d}"
        files = {}
        for path in sorted(folder.iterdir()):
            self.store.put_file(f"{place}/{path.name}", path)
            files[path.name] = file_sha256(path)
        manifest = {"format": FORMAT, "order": order, "identity": self.identity, "files": files}
        self.store.put_bytes(f"{place}/{MANIFEST}", json.dumps(manifest, indent=1).encode())
        shutil.rmtree(folder)
        for old in self._orders()[:-KEPT]:
            self._remove(old)

    def latest(self, target: Path) -> tuple[int, Path] | None:
        """Order and local copy of the newest whole state, or None. A damaged one is passed over.

        Raises InputError for a state that another version of Sparseline wrote, or that is another stage's.
        """
        for order in reversed(self._orders()):
            place, folder = f"{self.prefix}/{order:08d}", target / f"state-{order:08d}"
            manifest = json.loads(self.store.get_bytes(f"{place}/{MANIFEST}"))
            if manifest.get("format") != FORMAT:
                raise InputError(
                    f"the training state {self.store.uri}/{place} has the format {manifest.get('format')!r}, not "
                    f"{FORMAT}; remove {self.store.uri}/{self.prefix} to train from the start"
                )
            if manifest["identity"] != self.identity:
                raise InputError(
                    f"the training state {self.store.uri}/{place} is another training's: "
                    f"{_told(manifest['identity'], self.identity)}; remove it to train from the start"
                )
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            try:
                for name, sha256 in manifest["files"].items():
                    self.store.get_file(f"{place}/{name}", folder / name)
                    if file_sha256(folder / name) != sha256:
                        raise FileNotFoundError(name)
            except FileNotFoundError:
                shutil.rmtree(folder, ignore_errors=True)
                continue
            return order, folder
        return None

    def why_anew(self) -> str:
        """Why there is nothing to go on from, where states of other trainings of this stage lie beside; else "".

        Raises InputError when such a state differs in nothing but the version of Sparseline that wrote it.
        """
        nearest: tuple[int, str, str] | None = None
        newest = {key.rsplit("/", 2)[0]: key for key in self.store.keys(f"{self.folder}/") if key.endswith(MANIFEST)}
        for prefix, key in newest.items():
            try:
                manifest = json.loads(self.store.get_bytes(key))
            except FileNotFoundError:  # another run in the same store has just finished with it
                continue
            if prefix == self.prefix or manifest.get("format") != FORMAT:
                continue
            found, place = manifest["identity"], f"{self.store.uri}/{prefix}"
            differences = _differences(found, self.identity)
            if LAYOUT in differences and set(differences) <= {LAYOUT, "code"}:
                raise InputError(
                    f"the training state {place} was written by another version of Sparseline (layout {found[LAYOUT]}, "
                    f"this one reads {self.identity[LAYOUT]}); go on with that version, or remove it to begin anew "
                    "(`sparseline gc --delete` does, in this machine's own store)"
                )
            if nearest is None or len(differences) < nearest[0]:
                nearest = (len(differences), _told(found, self.identity), place)
        return f"the training state {nearest[2]} is another training's: {nearest[1]}" if nearest else ""

    def clear(self) -> None:
        """Remove all states: the stage published its result."""
        started = self.clock()
        self.wait()
        self.waited_seconds += self.clock() - started
        for key in self.store.keys(self.prefix):
            self.store.remove(key)

    def costs(self) -> dict[str, float]:
        """What saving took so far, as curves."""
        return {WAITED_SECONDS: self.waited_seconds, BACKGROUND_SECONDS: self.background_seconds}

    def _orders(self) -> list[int]:
        """Orders of the states whose manifest is there."""
        keys = self.store.keys(self.prefix)
        return sorted(int(key.split("/")[-2]) for key in keys if key.endswith(f"/{MANIFEST}"))

    def _remove(self, order: int) -> None:
        place = f"{self.prefix}/{order:08d}/"
        keys = [key for key in self.store.keys(self.prefix) if key.startswith(place)]
        # the manifest first: without it the rest is nothing
        for key in sorted(keys, key=lambda key: not key.endswith(MANIFEST)):
            self.store.remove(key)


def _differences(found: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What differs between two identities, by dotted name: the value of each, None where it has none."""
    left, right = flatten(found), flatten(own)
    return {
        name: (left.get(name), right.get(name)) for name in sorted({*left, *right}) if left.get(name) != right.get(name)
    }


def _is_hash(name: str) -> bool:
    return name == "code" or name.startswith("inputs.")


def _told(found: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """The first few differences, for a person."""
    differences = _differences(found, own)
    told = [
        f"{name} is another" if _is_hash(name) else f"{name} is {left!r} there, {right!r} here"
        for name, (left, right) in list(differences.items())[:_SHOWN]
    ]
    more = len(differences) - len(told)
    return ", ".join(told) + (f", and {more} more" if more > 0 else "")
