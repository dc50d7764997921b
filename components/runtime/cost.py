"""What a stage costs: core seconds, memory, GPU seconds, bytes to and from the store."""

from __future__ import annotations

import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

from components.runtime.object_store import ObjectStore


class Meter:
    """Counts from the moment it is made, for one process and those of its children that have ended by then."""

    def __init__(self) -> None:
        self._started, self._cores = time.monotonic(), _core_seconds()
        self.read = self.written = 0

    def cost(self) -> dict[str, float]:
        """core_seconds: of all threads and processes. peak_memory_bytes: largest resident set of this process plus the
        largest of a child. gpu_seconds: wall time times the GPUs that this process opened. bytes_read, bytes_written:
        from and to the object store."""
        unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
        peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return {
            "core_seconds": round(_core_seconds() - self._cores, 2),
            "peak_memory_bytes": float(sum(peaks) * unit),
            "gpu_seconds": round(_gpus() * (time.monotonic() - self._started), 2),
            "bytes_read": float(self.read),
            "bytes_written": float(self.written),
        }

    def watch(self, store: ObjectStore) -> ObjectStore:
        """The same store, whose traffic is counted here."""
        return _MeteredStore(store, self)


def _core_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _gpus() -> int:
    """GPUs on which this process has a context. Asking must not open one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0
    return sum(torch.cuda.memory_reserved(device) > 0 for device in range(torch.cuda.device_count()))


class _MeteredStore:
    """Passes everything on to a store and counts the bytes of what went through whole."""

    def __init__(self, store: ObjectStore, meter: Meter) -> None:
        self._store, self._meter = store, meter
        self.uri = store.uri

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def put_file(self, key: str, path: Path) -> None:
        self._store.put_file(key, path)
        self._meter.written += path.stat().st_size

    def put_bytes(self, key: str, data: bytes) -> None:
        self._store.put_bytes(key, data)
        self._meter.written += len(data)

    def get_file(self, key: str, path: Path) -> None:
        self._store.get_file(key, path)
        self._meter.read += path.stat().st_size

    def get_bytes(self, key: str) -> bytes:
        data = self._store.get_bytes(key)
        self._meter.read += len(data)
        return data

    def exists(self, key: str) -> bool:
        return self._store.exists(key)

    def keys(self, prefix: str = "") -> list[str]:
        return self._store.keys(prefix)

    def remove(self, key: str) -> None:
        self._store.remove(key)
