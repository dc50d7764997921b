"""Jobs in real processes."""

import os
import time
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
