"""Jobs in real processes."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import pytest

from components.runtime.errors import InputError
from components.runtime.workers import Workers, tell

_begun = "no"


def begin(word: str) -> None:
    global _begun
    _begun = word


def square(number: int) -> tuple[int, str, int]:
    for part in range(number):
        tell((number, part))
    return number * number, _begun, os.getpid()


def fail(number: int) -> None:
    tell("about to fail")
    refuse(number)


def refuse(number: int) -> None:
    raise InputError(f"job {number} is wrong")


def hang(mark: Path) -> None:
    mark.write_text(str(os.getpid()))
    time.sleep(600)


def end(code: int) -> None:
    os._exit(code)


class Odd(Exception):
    """Cannot be pickled: what it is made of is not what it is asked for again."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"odd {one} {two}")


def be_odd() -> None:
    raise Odd(1, 2)


def unpicklable() -> object:
    return lambda: None


def tell_from_threads(number: int) -> int:
    threads = [threading.Thread(target=lambda: [tell("x" * 5000) for _ in range(50)]) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return number


def semaphores() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob("sem.*")}


@pytest.mark.parametrize("number", [1, 3])
def test_results_come_in_order_and_everything_told_is_heard(number: int) -> None:
    heard: list[tuple[int, int]] = []
    with Workers(number, begin, "yes") as workers:
        first = workers.run([partial(square, n) for n in (3, 1, 2)], heard.append)
        second = workers.run([partial(square, 4)], heard.append)
    assert [result for result, _, _ in first + second] == [9, 1, 4, 16]
    assert {word for _, word, _ in first + second} == {"yes"}
    assert sorted(heard) == [(n, part) for n in (1, 2, 3, 4) for part in range(n)]
    assert (os.getpid() in {pid for _, _, pid in first}) == (number == 1)


@pytest.mark.parametrize("number", [1, 2])
def test_a_beginning_that_fails_is_told_as_what_it_is(number: int) -> None:
    with pytest.raises(InputError, match="job 7 is wrong"), Workers(number, refuse, 7) as workers:
        workers.run([partial(square, 1)], print)


def test_a_job_that_fails_ends_the_others_with_its_error(tmp_path: Path) -> None:
    mark = tmp_path / "pid"

    def wait_for_the_other(_: object) -> None:
        while not (mark.exists() and mark.read_text()):
            time.sleep(0.01)

    with pytest.raises(InputError, match="job 2 is wrong"), Workers(2) as workers:
        workers.run([partial(hang, mark), partial(fail, 2)], wait_for_the_other)
    assert not psutil.pid_exists(int(mark.read_text()))


def test_a_worker_that_ends_is_named() -> None:
    with (
        pytest.raises(RuntimeError, match=r"worker 0 of the stage ended too early \(exit code 5\)"),
        Workers(2) as workers,
    ):
        workers.run([partial(end, 5), partial(time.sleep, 600)], print)


@pytest.mark.parametrize(("job", "told"), [(be_odd, "Odd: odd 1 2"), (unpicklable, "pickle")])
def test_what_cannot_be_carried_is_told(job: Callable[[], object], told: str) -> None:
    with pytest.raises(Exception, match=told), Workers(2) as workers:
        workers.run([job], print)


def test_an_error_brings_its_traceback() -> None:
    with pytest.raises(InputError) as error, Workers(2) as workers:
        workers.run([partial(refuse, 3)], print)
    assert "in refuse" in error.value.__notes__[0]


def test_a_job_may_tell_from_threads() -> None:
    heard: list[str] = []
    with Workers(2) as workers:
        assert workers.run([partial(tell_from_threads, 3), partial(tell_from_threads, 2)], heard.append) == [3, 2]
    assert heard == ["x" * 5000] * 250


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs Linux")
def test_nothing_of_them_outlives_a_kill(tmp_path: Path) -> None:
    """A run that is killed with all its processes leaves no semaphore: nobody would be there to remove it."""
    mark, before = tmp_path / "pid", semaphores()
    program = f"""
from functools import partial
from pathlib import Path
from components.runtime.workers import Workers
from tests.components.runtime.test_workers import hang
if __name__ == "__main__":
    with Workers(2) as workers:
        workers.run([partial(hang, Path({str(mark)!r}))] * 2, print)
"""
    script = tmp_path / "program.py"
    script.write_text(program)
    root = Path(__file__).resolve().parents[3]
    process = subprocess.Popen(
        [sys.executable, str(script)], env={**os.environ, "PYTHONPATH": str(root)}, start_new_session=True
    )
    while not (mark.exists() and mark.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert semaphores() <= before
