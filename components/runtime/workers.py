"""Jobs side by side in processes of this machine. What a job tells on its way reaches the caller while it runs.

Over pipes alone: a queue of `multiprocessing`, and so an executor, has named semaphores, which outlive a killed run.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import TracebackType
from typing import Any, TypeVar

from components.runtime.processes import collect_rarely, die_with_parent

_T = TypeVar("_T")

# of this process
_hear: Callable[[Any], None]


def tell(message: Any) -> None:
    """From inside a job: hand `message` to the `hear` of `Workers.run`."""
    _hear(message)


class Workers:
    """`number` processes, each after `begin(*arguments)`; with one, all happens in this process.

    Jobs and their results, `begin` and its arguments can be pickled. What `begin` raises, the caller gets, as from a
    job. To be used in a `with` statement, in the thread that made it: leaving it by an exception kills what still runs.
    """

    def __init__(self, number: int, begin: Callable[..., None] | None = None, *arguments: Any) -> None:
        self._workers: dict[Connection, SpawnProcess] = {}
        if number == 1:
            if begin:
                begin(*arguments)
            return
        spawn = multiprocessing.get_context("spawn")
        for place in range(number):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=_serve, args=(theirs, begin, arguments), name=f"worker {place}")
            process.start()
            theirs.close()
            self._workers[ours] = process

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        for connection, process in self._workers.items():
            if kind is not None:
                process.kill()
            connection.close()  # which a worker without a job takes as the end
        for process in self._workers.values():
            process.join()

    def run(self, jobs: Sequence[Callable[[], _T]], hear: Callable[[Any], None]) -> list[_T]:
        """The jobs' results, in their order. They begin in that order too.

        Raises what the first to fail raised, and RuntimeError when a worker ends without an answer.
        """
        global _hear
        if not self._workers:
            _hear = hear
            return [job() for job in jobs]
        results: dict[int, _T] = {}
        waiting, free, busy = deque(enumerate(jobs)), deque(self._workers), dict[Connection, int]()
        while waiting or busy:
            while waiting and free:
                place, job = waiting.popleft()
                connection = free.popleft()
                busy[connection] = place
                with contextlib.suppress(BrokenPipeError):  # it has ended: `_answer` says so
                    connection.send(job)
            for answering in [one for one in wait(list(busy)) if isinstance(one, Connection)]:
                kind, value = self._answer(answering)
                if kind == "told":
                    hear(value)
                elif kind == "failed":
                    raise value
                else:
                    results[busy.pop(answering)] = value
                    free.append(answering)
        return [results[place] for place in range(len(jobs))]

    def _answer(self, connection: Connection) -> tuple[str, Any]:
        try:
            kind, value = connection.recv()
        except (EOFError, ConnectionResetError) as error:
            process = self._workers[connection]
            process.join()
            raise RuntimeError(
                f"{process.name} of the stage ended too early (exit code {process.exitcode}); what it wrote is above; "
                "run the command again to go on"
            ) from error
        return kind, value


def _serve(connection: Connection, begin: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    """What a worker does until the connection is closed."""
    global _hear
    die_with_parent()
    collect_rarely()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's decision
    sending = threading.Lock()  # a job may tell from threads of its own

    def answer(kind: str, value: Any) -> None:
        with sending:
            connection.send((kind, value))

    def hear(message: Any) -> None:
        answer("told", message)

    _hear = hear
    begun = False
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        try:
            if begin and not begun:
                begin(*arguments)
            begun = True
            answer("done", job())
        except Exception as error:
            answer("failed", _carried(error))


def _carried(error: Exception) -> Exception:
    """The error with its traceback as a note, or, when it cannot be pickled, one that says the same."""
    error.add_note("".join(traceback.format_exception(error)))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}\n{error.__notes__[-1]}")
    return error
