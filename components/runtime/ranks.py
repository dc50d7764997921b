"""Data-parallel work on one machine: processes that hold the same weights and each take a share of every batch.

On a CPU two processes of one thread each are nearly twice as fast as one process of two threads for a small model,
whose single operations are too short to divide. The exchange runs over torch.distributed (gloo).
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as distributed

from components.runtime.processes import collect_rarely, die_with_parent

_DEADLINE = timedelta(minutes=10)  # a process that hangs longer than this ends the work
_T = TypeVar("_T")


@dataclass(frozen=True)
class Ranks:
    """This process among those that work. Rank 0 is the stage itself: it alone records, validates and saves."""

    rank: int = 0
    size: int = 1

    def share(self, items: Sequence[_T]) -> list[_T]:
        """Every `size`-th item: neighbours of a sorted batch differ little, so that the shares cost about the same."""
        return self.shares(items)[self.rank]

    def shares(self, items: Sequence[_T]) -> list[list[_T]]:
        """The shares of all ranks."""
        return [list(items[rank :: self.size]) for rank in range(self.size)]

    def sum(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor (fp32) by its sum over the ranks; bitwise the same on every rank."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        distributed.all_reduce(flat)
        for tensor, summed in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(summed.view_as(tensor))

    def from_first(self, value: Any) -> Any:
        """What rank 0 gave for `value`; the others' own is ignored."""
        if self.size == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box, src=0)
        return box[0]

    def deal(self, values: Sequence[Any] | None) -> Any:
        """Rank r gets `values[r]` of rank 0; the others give None."""
        if self.size == 1:
            assert values is not None
            return values[0]
        box: list[Any] = [None]
        distributed.scatter_object_list(box, list(values) if values is not None else None, src=0)
        return box[0]

    def to_first(self, value: Any) -> list[Any]:
        """At rank 0 the values of all ranks, at the others nothing."""
        if self.size == 1:
            return [value]
        found: list[Any] | None = [None] * self.size if self.rank == 0 else None
        distributed.gather_object(value, found, dst=0)
        return found or []


@contextmanager
def open_ranks(size: int, directory: Path, follow: Callable[..., None], *arguments: Any) -> Iterator[Ranks]:
    """Rank 0 of `size`; ranks 1 and up run `follow(ranks, *arguments)` in processes of their own.

    `follow` is a module's function and the arguments can be pickled. A rank that fails ends the others: rank 0 raises
    RuntimeError at its next exchange with them.
    """
    if size == 1:
        yield Ranks()
        return
    meeting = directory / "ranks"
    meeting.unlink(missing_ok=True)
    spawn = multiprocessing.get_context("spawn")
    others: list[SpawnProcess] = []
    try:
        for rank in range(1, size):
            ours, theirs = spawn.Pipe(duplex=False)
            process = spawn.Process(
                target=_run, args=(rank, size, meeting, theirs, follow, arguments), name=f"rank {rank}", daemon=True
            )
            process.start()
            others.append(process)
            theirs.close()
            wait([ours, process.sentinel])
            if not ours.poll():
                process.join()
                raise _ended(others, None)
        _join(meeting, 0, size)
        try:
            yield Ranks(0, size)
        except RuntimeError as error:
            for process in others:
                process.join(timeout=1)
            if any(process.exitcode for process in others):
                raise _ended(others, error) from error
            raise
        for process in others:
            process.join(timeout=30)
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
        for process in others:
            process.kill()
            process.join()
        meeting.unlink(missing_ok=True)


def _ended(processes: Sequence[SpawnProcess], cause: Exception | None) -> RuntimeError:
    ended = ", ".join(f"{process.name} (exit code {process.exitcode})" for process in processes if process.exitcode)
    return RuntimeError(
        f"processes of the stage ended too early: {ended}{f' ({cause})' if cause else ''}; what they wrote is above; "
        "run the command again to go on"
    )


def _run(
    rank: int, size: int, meeting: Path, started: Connection, follow: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    die_with_parent()
    collect_rarely()
    started.send(True)
    _join(meeting, rank, size)
    try:
        follow(Ranks(rank, size), *arguments)
    finally:
        distributed.destroy_process_group()


def _join(meeting: Path, rank: int, size: int) -> None:
    store = distributed.FileStore(str(meeting), size)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=_DEADLINE)
