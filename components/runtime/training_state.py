"""Training state of a stage that can be stopped at any moment: saved beside the training, found again by the next try.

It is not the published checkpoint. It lies under `training-state/<stage>/<identity>/<order>/` in the store, where the
identity is the hash of all that the result follows from (configuration, seed, inputs, sources), so a changed stage
never goes on from another's state. The files go first and the manifest with their hashes last; the newest two are
kept, so that a kill while one is written, or a damaged one, costs one interval and not the training.
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

FORMAT = "sparseline-training-state/1"
KEPT = 2


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
    ) -> None:
        self.store, self.scratch, self.interval, self.clock = store, scratch, interval_seconds, clock
        self.prefix = f"training-state/{stage}/{digest(dict(identity))[:32]}"
        self._saved_at = clock()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def due(self) -> bool:
        """Whether the interval since the last save (or the start) is over."""
        return self.clock() - self._saved_at >= self.interval

    def save(self, order: int, write: Callable[[Path], None]) -> None:
        """Store what `write` puts into the folder it is given. `order` grows with every save of the training.

        `write` runs in the background, so it must hold copies of what training changes. Waits for the save before this
        one; raises the error with which that one ended.
        """
        self.wait()
        self._saved_at = self.clock()
        self._thread = threading.Thread(target=self._run, args=(order, write), name="training state", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for a save that is under way. Raises the error with which it ended."""
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._error:
            error, self._error = self._error, None
            raise error

    def _run(self, order: int, write: Callable[[Path], None]) -> None:
        try:
            self._save(order, write)
        except BaseException as error:
            self._error = error  # told by the next `wait`, in the thread of the stage

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
        manifest = {"format": FORMAT, "order": order, "files": files}
        self.store.put_bytes(f"{place}/{MANIFEST}", json.dumps(manifest, indent=1).encode())
        shutil.rmtree(folder)
        for old in self._orders()[:-KEPT]:
            self._remove(old)

    def latest(self, target: Path) -> tuple[int, Path] | None:
        """Order and local copy of the newest whole state, or None. A damaged one is passed over.

        Raises InputError for a state that another version of Sparseline wrote.
        """
        for order in reversed(self._orders()):
            place, folder = f"{self.prefix}/{order:08d}", target / f"state-{order:08d}"
            manifest = json.loads(self.store.get_bytes(f"{place}/{MANIFEST}"))
            if manifest.get("format") != FORMAT:
                raise InputError(
                    f"the training state {self.store.uri}/{place} has the format {manifest.get('format')!r}, not "
                    f"{FORMAT}; remove {self.store.uri}/{self.prefix} to train from the start"
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

    def clear(self) -> None:
        """Remove all states: the stage published its result."""
        self.wait()
        for key in self.store.keys(self.prefix):
            self.store.remove(key)

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
