"""Jobs side by side in processes of this machine. What a job tells on its way reaches the caller while it runs."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

from components.runtime.processes import collect_rarely, die_with_parent

_T = TypeVar("_T")
_HEAR_SECONDS = 0.25  # between two looks at what the workers told

# of this process
_hear: Callable[[Any], None]
_to_begin: Callable[[], None] | None = None  # what a worker's first job has to wait for


def tell(message: Any) -> None:
    """From inside a job: hand `message` to the `hear` of `Workers.run`."""
    _hear(message)


class Workers:
    """`number` processes, each after `begin(*arguments)`; with one, all happens in this process.

    Jobs and their results, `begin` and its arguments can be pickled. What `begin` raises, the caller gets, as from a
    job. To be used in a `with` statement: leaving it by an exception kills what still runs.
    """

    def __init__(self, number: int, begin: Callable[..., None] | None = None, *arguments: Any) -> None:
        self._pool: ProcessPoolExecutor | None = None
        if number > 1:
            spawn = multiprocessing.get_context("spawn")
            self._told = spawn.SimpleQueue()
            self._pool = ProcessPoolExecutor(number, spawn, _begin_worker, (self._told.put, begin, arguments))
        elif begin:
            begin(*arguments)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if self._pool is None:
            return
        if kind is not None:
            for process in list((self._pool._processes or {}).values()):  # Python 3.14 has kill_workers()
                process.kill()
        self._pool.shutdown(cancel_futures=True)
        self._told.close()

    def run(self, jobs: Sequence[Callable[[], _T]], hear: Callable[[Any], None]) -> list[_T]:
        """The jobs' results, in their order. They begin in that order too. Raises what the first to fail raised."""
        global _hear
        if self._pool is None:
            _hear = hear
            return [job() for job in jobs]
        futures: list[Future[_T]] = [self._pool.submit(_work, job) for job in jobs]
        waiting = set(futures)
        while waiting:
            ended, waiting = wait(waiting, timeout=_HEAR_SECONDS, return_when=FIRST_COMPLETED)
            while not self._told.empty():
                hear(self._told.get())
            for future in ended:
                future.result()
        return [future.result() for future in futures]


def _begin_worker(told: Callable[[Any], None], begin: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    global _hear, _to_begin
    die_with_parent()
    collect_rarely()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's decision
    _hear = told
    # not here: an executor tells of an initializer that fails, but not why
    _to_begin = partial(begin, *arguments) if begin else None


def _work(job: Callable[[], _T]) -> _T:
    global _to_begin
    if _to_begin:
        _to_begin()
        _to_begin = None
    return job()
