"""Errors that a person can act on, and the exit code of each: bad input 2, failed gate 3, anything else 1."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# as SQLite, the C library and torch's writer of archives say it
FULL_DISK = ("database or disk is full", "No space left on device", "PytorchStreamWriter failed")
EXIT_FAULT, EXIT_INPUT, EXIT_REJECTED, EXIT_INTERRUPTED = 1, 2, 3, 130


class InputError(Exception):
    """Something that was given to us is wrong. The message says what, where, and what to do."""


class GateRejected(Exception):
    """The gate decided, with numbers, that the candidate is not to be promoted. No fault."""


class RemoteFault(Exception):
    """A fault in a process elsewhere, whose own log has the traceback already."""


def exit_code(error: BaseException) -> int:
    """The exit code that `error` ends a program with."""
    if isinstance(error, InputError):
        return EXIT_INPUT
    if isinstance(error, GateRejected):
        return EXIT_REJECTED
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    return EXIT_FAULT


def kind(error: BaseException) -> str:
    return {EXIT_INPUT: "input", EXIT_REJECTED: "rejected", EXIT_INTERRUPTED: "interrupted"}.get(
        exit_code(error), "fault"
    )


@contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turn a full, read-only or forbidden disk into an InputError that names the place."""
    try:
        yield
    except Exception as error:
        if isinstance(error, (InputError, GateRejected)):
            raise
        number = error.errno if isinstance(error, OSError) else None
        if number in (errno.ENOSPC, errno.EDQUOT) or _tells_of_a_full_disk(error):
            raise InputError(f"the disk is full at {where}; free some space or choose another folder") from error
        if number in (errno.EROFS, errno.EACCES, errno.EPERM):
            reason = os.strerror(number).lower()
            raise InputError(f"cannot write to {where}: {reason}; choose another folder") from error
        raise


def _tells_of_a_full_disk(error: BaseException | None) -> bool:
    """Whether a library's own kind of error, or what caused it, is about a full disk (SQLite, safetensors, torch)."""
    while error is not None:
        if any(text in str(error) for text in FULL_DISK):
            return True
        error = error.__cause__ or error.__context__
    return False


def without_password(text: str) -> str:
    """`text` with the passwords of the addresses in it (scheme://user:password@host) made unreadable."""
    return re.sub(r"(//[^/:@]*):[^@/]*@", r"\1:***@", text)
